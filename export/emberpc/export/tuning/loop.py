"""The training loop: AdamW, warm-up and linear decay, early stopping, and resuming from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time

import numpy as np
import torch
from torch import nn

from emberpc.export.errors import ExportError
from emberpc.export.progress import Progress, no_progress
from emberpc.export.timing import Cost
from emberpc.export.tuning.checkpoint import Checkpoint, TrainingState

#: Number of batches whose texts are drawn together and sorted by length: a batch of texts of similar length needs
#: little padding.
_BUCKET = 8


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training.

    `encoder_rate` and `head_rate` are the peak values of AdamW's learning rates. The rates rise linearly over the first
    `warm_up` share of the steps, and then fall linearly to 0. `batch` is a number of texts. `weight_decay` applies to
    the encoder's parameters, and `max_gradient` limits the norm of their gradient.
    """

    epochs: int
    encoder_rate: float = 2e-4
    head_rate: float = 1e-3
    batch: int = 16
    warm_up: float = 0.1
    weight_decay: float = 0.01
    max_gradient: float = 1.0
    #: The training stops after this number of epochs in a row whose held-out score is worse than the best by more than
    #: the tolerance of `train`. Without held-out scores, all epochs are run.
    patience: int = 3


@dataclass(frozen=True)
class Log:
    """Course of a training: mean loss and held-out score of each epoch, and the best epoch.

    `best_epoch` counts from 1; the weights after it were kept. It is the last epoch whose score is as good as the best
    score (see `train`); without held-out scores, the last epoch. After a resumption, `losses` lacks the epochs before
    it, and `scores` has all.
    """

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
    """Train parameters in place with AdamW, and keep the weights of the best epoch.

    Args:
        parameters: parameters of the encoder, by name.
        heads: parameters of the head, by name; they have their own learning rate and no weight decay.
        batches: returns the batches of an epoch, which is numbered from 0, as indexes of texts. The same epoch must
            always have the same batches.
        loss_of: returns the mean loss of a batch.
        recipe: hyperparameters.
        score: called after each epoch; returns a score on held-out texts, greater is better. The weights of the last
            epoch that is as good as the best are kept. Default: the weights of the last epoch are kept.
        tolerance: a score that is lower than the best by at most this much is as good. Give the standard error of the
            score: otherwise chance would stop the training if few texts are held out.
        checkpoint: stores the state after each epoch; a stored state is resumed. A finished training leaves its weights
            there, and the caller removes them once the result is stored.
        stage: name of the step in the progress.
        progress: called at every step with the epoch's mean loss and the remaining seconds.

    Returns:
        The course of the training. After a resumption, its losses are only those of the epochs since then.

    Raises:
        ExportError: the loss is not finite.
        NoSpaceError: the checkpoint cannot be written.
    """
    checkpoint = checkpoint or Checkpoint(None)
    everything = {**parameters, **heads}
    optimizer = torch.optim.AdamW(
        [
            {"params": list(parameters.values()), "lr": recipe.encoder_rate, "weight_decay": recipe.weight_decay},
            {"params": list(heads.values()), "lr": recipe.head_rate, "weight_decay": 0.0},
        ],
        # The fused step makes one pass over the parameters instead of about ten, in a third of the CPU time.
        fused=True,
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
            nn.utils.clip_grad_norm_(list(parameters.values()), recipe.max_gradient)
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
    # Keep the weights until the caller has stored the result, but not the optimizer's state, which is twice as large.
    checkpoint.write(TrainingState(_values(everything), recipe.epochs, log.scores, spent()))
    return Log(log.losses, log.scores, _best_epoch(log.scores, tolerance) if log.scores else recipe.epochs)


def shuffled(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch as indexes of texts: in random order, with texts of similar length in a batch.

    Args:
        lengths: number of tokens of each text.
        size: number of texts of a batch.
        seed: seed of the order.
        epoch: number of the epoch, from 0; each epoch has its own order.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths)).tolist()
    found = []
    for start in range(0, len(order), size * _BUCKET):
        bucket = sorted(order[start : start + size * _BUCKET], key=lambda row: lengths[row])
        found += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return [found[i] for i in generator.permutation(len(found))]


def _best_epoch(scores: Sequence[float], tolerance: float) -> int:
    """Return the number, from 1, of the last epoch whose score is within `tolerance` of the best; 0 without epochs."""
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
    """Load the state that `checkpoint` stores, if there is one, into parameters and optimizer.

    Returns:
        The state and the best epoch's weights by name; an empty state and no weights if none is stored.
    """
    state = checkpoint.read()
    if state is None:
        return TrainingState({}), {}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.tensors[f"value.{name}"])
            if f"step.{name}" in state.tensors:  # absent once the training is finished
                optimizer.state[parameter] = {kind: state.tensors[f"{kind}.{name}"] for kind in kinds}
    prefix = "best."
    best = {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
    return state, best
