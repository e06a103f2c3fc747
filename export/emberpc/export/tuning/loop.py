"""The training loop: AdamW, warm-up and linear decay, early stopping, and going on after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time

import numpy as np
import torch
from torch import nn

from emberpc.export.errors import ExportError
from emberpc.export.progress import Progress, no_progress
from emberpc.export.tuning.checkpoint import Checkpoint, TrainingState
from emberpc.export.workbench import Cost

#: So many batches are put together before their texts are sorted by length: short with short wastes little on padding.
_BUCKET = 8


@dataclass(frozen=True)
class Recipe:
    """How to train: the rates are AdamW's at their peak, after a tenth of the steps; then they fall to 0 in a line."""

    epochs: int
    encoder_rate: float = 2e-4
    head_rate: float = 1e-3
    batch: int = 16
    warm_up: float = 0.1
    weight_decay: float = 0.01
    most_gradient: float = 1.0
    #: Stop when so many epochs in a row were worse than the best one on held-out texts.
    patience: int = 3


@dataclass(frozen=True)
class Log:
    """How a training went: the mean loss of each epoch, the held-out scores, and the epoch whose weights were kept."""

    losses: list[float]
    scores: list[float] = field(default_factory=list)
    best_epoch: int = 0


def train(
    parameters: Mapping[str, nn.Parameter],
    heads: Mapping[str, nn.Parameter],
    batches: Callable[[int], list[list[int]]],
    loss_of: Callable[[list[int]], torch.Tensor],
    recipe: Recipe,
    *,
    score: Callable[[], float] | None = None,
    tolerance: float = 0.0,
    checkpoint: Checkpoint | None = None,
    stage: str = "training",
    progress: Progress = no_progress,
) -> Log:
    """Train parameters in place.

    Args:
        parameters: of the encoder.
        heads: of what stands on it, which learns faster and without weight decay.
        batches: gives an epoch's batches of texts' indexes; the same for the same epoch.
        loss_of: the mean loss of a batch.
        recipe: how.
        score: measures on held-out texts after each epoch, the higher the better: weights are kept of the last epoch
            that is as good as the best. Default: those of the last one.
        tolerance: a score so much below the best is as good: the standard error, or where few texts are held out
            chance would stop the training.
        checkpoint: where to keep the state after each epoch, and to find one to go on from; a training that is done
            leaves its weights there, for whoever stores what comes of it to remove.
        stage: what to call it in the progress.
        progress: told of every step, the loss and the time left.

    Raises:
        ExportError: the loss is no longer a number.
    """
    checkpoint = checkpoint or Checkpoint(None)
    everything = {**parameters, **heads}
    optimizer = torch.optim.AdamW(
        [
            {"params": list(parameters.values()), "lr": recipe.encoder_rate, "weight_decay": recipe.weight_decay},
            {"params": list(heads.values()), "lr": recipe.head_rate, "weight_decay": 0.0},
        ]
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    per_epoch = len(batches(0))
    total = per_epoch * recipe.epochs
    state, best = _resumed(checkpoint, everything, optimizer)
    log = Log([], state.scores)
    began, began_cpu = perf_counter(), process_time()

    def spent() -> Cost:
        before = state.spent
        return Cost(before.seconds + perf_counter() - began, before.cpu_seconds + process_time() - began_cpu)

    for epoch in range(state.epoch, recipe.epochs):
        if score and epoch - _best_epoch(log.scores, tolerance) >= recipe.patience:
            break
        sum_of_losses = 0.0
        for number, rows in enumerate(batches(epoch)):
            step = epoch * per_epoch + number
            factor = min((step + 1) / (recipe.warm_up * total), (total - step) / ((1 - recipe.warm_up) * total), 1.0)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = loss_of(rows)
            if not torch.isfinite(loss):
                raise ExportError(f"the loss is {loss.item()} in epoch {epoch + 1}; try another seed or strategy")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(list(parameters.values()), recipe.most_gradient)
            optimizer.step()
            sum_of_losses += loss.item()
            left = (perf_counter() - began) / (step + 1 - state.epoch * per_epoch) * (total - step - 1)
            progress(stage, step + 1, total, f"loss {sum_of_losses / (number + 1):.3f}, {left:.0f} s left")
        log.losses.append(sum_of_losses / per_epoch)
        if score:
            log.scores.append(score())
            if _best_epoch(log.scores, tolerance) == epoch + 1:
                best = {name: parameter.detach().clone() for name, parameter in everything.items()}
        checkpoint.write(_state(everything, optimizer, best, epoch + 1, log.scores, spent()))
    if best:
        with torch.no_grad():
            for name, parameter in everything.items():
                parameter.copy_(best[name])
    # It stays until what comes of the training is stored; the optimizer's state, twice the weights, need not.
    checkpoint.write(TrainingState(_values(everything), recipe.epochs, log.scores, spent()))
    return Log(log.losses, log.scores, _best_epoch(log.scores, tolerance) if log.scores else recipe.epochs)


def shuffled(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches of texts' indexes: in random order, and of like length within a batch.

    Args:
        lengths: tokens of each text.
        size: texts of a batch.
        seed: of the order.
        epoch: each has an order of its own.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths)).tolist()
    found = []
    for start in range(0, len(order), size * _BUCKET):
        bucket = sorted(order[start : start + size * _BUCKET], key=lambda row: lengths[row])
        found += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return [found[i] for i in generator.permutation(len(found))]


def _best_epoch(scores: Sequence[float], tolerance: float) -> int:
    """Return the number of the last epoch, from 1, whose score is the best or as good; 0 before the first."""
    return max((i for i, score in enumerate(scores, 1) if score >= max(scores) - tolerance), default=0)


def _values(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {f"value.{name}": parameter.detach() for name, parameter in parameters.items()}


def _state(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, torch.Tensor],
    epoch: int,
    scores: list[float],
    spent: Cost,
) -> TrainingState:
    tensors = {**_values(parameters), **{f"best.{name}": tensor for name, tensor in best.items()}}
    for name, parameter in parameters.items():
        for kind, tensor in optimizer.state[parameter].items():
            tensors[f"{kind}.{name}"] = tensor
    return TrainingState(tensors, epoch, scores, spent)


def _resumed(
    checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[TrainingState, dict[str, torch.Tensor]]:
    """Go back to the state that was kept, if there is one; return it with the best epoch's weights."""
    state = checkpoint.read()
    if state is None:
        return TrainingState({}), {}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.tensors[f"value.{name}"])
            if f"step.{name}" in state.tensors:  # else the training was done
                optimizer.state[parameter] = {kind: state.tensors[f"{kind}.{name}"] for kind in kinds}
    prefix = "best."
    best = {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
    return state, best
