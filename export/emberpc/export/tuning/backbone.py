"""A PyTorch encoder whose frozen lower layers run once per text; training steps run the upper layers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from emberpc.export.errors import ExportError
from emberpc.export.libraries import calling_libraries
from emberpc.export.progress import Progress, no_progress
from emberpc.export.source.encoder import Encoder

#: Texts of a batch when nothing is trained. Batches are made of texts of similar length.
_BATCH = 32

TokenIds = Sequence[int]
#: Hidden states of a text after the frozen lower layers: float16 (tokens, hidden size). Half precision halves the
#: memory (17 MB for 1,000 texts of 20 tokens with 384 dimensions) and does not change the training measurably.
States = npt.NDArray[np.float16]


class _CachedStates(nn.Module):
    """Takes the place of the lower layers and returns their cached states, whatever its input.

    The rest of the model runs unchanged. Its own code computes the masks and position biases that the upper layers
    need, for every architecture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: torch.Tensor | None = None

    def forward(self, *_inputs: object, **_options: object) -> tuple[torch.Tensor | None]:
        return (self.states,)


class Backbone:
    """An encoder with its pooling in PyTorch, prepared for training of its upper layers.

    Args:
        encoder: the encoder to load.

    Raises:
        ExportError: sentence-transformers cannot load it, or its list of layers is not found.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        with calling_libraries(
            f"{encoder.folder} cannot be run by sentence-transformers", "is it an encoder that it supports?"
        ):
            self.model = SentenceTransformer(str(encoder.folder), device="cpu", local_files_only=True)
        self.model.max_seq_length = encoder.max_tokens
        # Dropout is off: over so few epochs it made no measurable difference.
        self.model.eval()
        self._transformer = self.model[0].auto_model
        self._owner, self._name = self._find_layers()
        self._layers = list(getattr(self._owner, self._name))
        self._cached = _CachedStates()
        self._trained: dict[str, nn.Parameter] = {}
        self._original: dict[str, torch.Tensor] = {}
        self._frozen = 0

    @property
    def layers(self) -> int:
        """Number of layers of the encoder."""
        return len(self._layers)

    def _find_layers(self) -> tuple[nn.Module, str]:
        """Return the module that holds the list of layers, and the list's attribute name; raise ExportError if none."""
        config = self._transformer.config
        count = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", None)
        for module in self._transformer.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    return module, name
        raise ExportError(
            f"{self.encoder.name} has no list of {count} layers that could be trained; use the strategy linear"
        )

    def tokenize(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the token ids of texts, truncated at the encoder's most tokens; no prompt is added."""
        given = [text.lower() for text in texts] if self.encoder.lower_case else list(texts)
        found: list[TokenIds] = self.model.tokenizer(
            given, truncation=True, max_length=self.encoder.max_tokens, return_attention_mask=False
        )["input_ids"]
        return found

    def train_top(self, top: int) -> dict[str, nn.Parameter]:
        """Restore the original weights, and set the upper `top` layers and all modules behind them to be trained.

        Returns:
            The parameters to train, by name; if `top` is the number of layers, all parameters of the model.
        """
        self.reset()
        upper = self._layers[self.layers - top :]
        modules = [self.model] if top == self.layers else [*upper, *list(self.model)[1:]]
        for module in modules:
            module.requires_grad_(True)
        self._trained = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            # BERT's pooler does not affect the token vectors.
            if parameter.requires_grad and "pooler" not in name.split(".")
        }
        self._original = self.weights()
        self._freeze(top)
        return self._trained

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the trained parameters, by name."""
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the trained parameters to other values.

        Raises:
            KeyError: a parameter is missing in `weights`.
        """
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])

    def reset(self) -> None:
        """Restore the original weights and all layers; set no parameter to be trained."""
        self.load(self._original)
        self._trained, self._original = {}, {}
        self.model.requires_grad_(False)
        self._freeze(self.layers)

    def _freeze(self, top: int) -> None:
        """Run only the upper `top` layers from now on; cached states take the place of the layers below."""
        self._frozen = self.layers - top
        upper = self._layers[self._frozen :]
        setattr(self._owner, self._name, nn.ModuleList([self._cached, *upper] if self._frozen else upper))

    @contextmanager
    def all_layers(self) -> Iterator[None]:
        """Run all layers inside the block, with the current weights: for texts whose lower states are not cached."""
        top = self.layers - self._frozen
        self._freeze(self.layers)
        try:
            yield
        finally:
            self._freeze(top)

    def lower_states(self, tokens: Sequence[TokenIds], top: int, progress: Progress = no_progress) -> list[States]:
        """Run the layers below the upper `top` once, with the original weights; return their states for each text."""
        self.reset()
        caught: list[torch.Tensor] = []

        def catch(_module: nn.Module, _inputs: object, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        found: list[States | None] = [None] * len(tokens)
        setattr(self._owner, self._name, nn.ModuleList(self._layers[: self.layers - top]))
        hook = self._layers[self.layers - top - 1].register_forward_hook(catch)
        try:
            done = 0
            for rows in by_length(tokens, _BATCH):
                caught.clear()
                with torch.inference_mode():
                    self._transformer(**self._features([tokens[row] for row in rows]))
                for row, states in zip(rows, caught[0], strict=True):
                    found[row] = states[: len(tokens[row])].numpy().astype(np.float16)
                done += len(rows)
                progress("running the lower layers", done, len(tokens))
        finally:
            hook.remove()
            self.reset()
        return [states for states in found if states is not None]

    def forward(self, tokens: Sequence[TokenIds], states: Sequence[States] | None = None) -> torch.Tensor:
        """Return the vectors of a batch of texts with the current weights, float32 (texts, dimensions).

        Args:
            tokens: token ids of each text.
            states: cached states of each text; not needed if no layer is frozen.

        Raises:
            ValueError: layers are frozen and `states` is None.
        """
        features = self._features(tokens)
        if self._frozen:
            if states is None:
                raise ValueError("the lower layers are frozen; pass their states")
            length = features["input_ids"].shape[1]
            padded = np.zeros((len(states), length, states[0].shape[1]), dtype=np.float32)
            for row, own in zip(padded, states, strict=True):
                row[: len(own)] = own
            self._cached.states = torch.from_numpy(padded)
        found: torch.Tensor = self.model(features)["sentence_embedding"]
        return found

    def embed(
        self, tokens: Sequence[TokenIds], states: Sequence[States] | None = None, progress: Progress = no_progress
    ) -> npt.NDArray[np.float32]:
        """Embed texts in batches with the current weights, without gradients; return float32 (texts, dimensions).

        `tokens` and `states` are as for `forward`; `progress` is called with the number of texts done.
        """
        found: dict[int, npt.NDArray[np.float32]] = {}
        for rows in by_length(tokens, _BATCH):
            with torch.inference_mode():
                vectors = self.forward([tokens[row] for row in rows], states and [states[row] for row in rows])
            found |= zip(rows, vectors.numpy(), strict=True)
            progress("embedding with the tuned encoder", len(found), len(tokens))
        return np.stack([found[row] for row in range(len(tokens))])

    def save(self, weights: Mapping[str, torch.Tensor], top: int, folder: Path) -> None:
        """Write the model with trained weights in the format of sentence-transformers; then restore the original ones.

        Args:
            weights: the result of `weights`.
            top: the argument of `train_top` for these weights.
            folder: folder to write to.

        Raises:
            ExportError: the folder cannot be written.
        """
        self.train_top(top)
        self.load(weights)
        self._freeze(self.layers)
        with calling_libraries(f"the tuned {self.encoder.name} cannot be written", "is there room on the disk?"):
            self.model.save_pretrained(str(folder), create_model_card=False)
        self.reset()

    def _features(self, tokens: Sequence[TokenIds]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids in tokens)
        input_ids = np.full((len(tokens), longest), self.model.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros((len(tokens), longest), dtype=np.int64)
        for row, ids in enumerate(tokens):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}


def by_length(tokens: Sequence[TokenIds], size: int) -> Iterator[list[int]]:
    """Yield the indexes of texts in batches of similar length, the shortest texts first."""
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
