"""A PyTorch encoder whose frozen lower layers run once for each text; training steps run the upper layers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from emberpc.export.errors import ExportError
from emberpc.export.libraries import calling_libraries, load_sentence_transformer
from emberpc.export.progress import Progress, no_progress
from emberpc.export.source.encoder import SourceEncoder

#: Number of texts of a batch when nothing is trained. Batches are made of texts of similar length.
_BATCH = 32

TokenIds = Sequence[int]
#: Hidden states of a text after the frozen lower layers: float16 (tokens, hidden size). Half precision takes half the
#: memory of float32 (15 MB for 1,000 texts of 20 tokens with a hidden size of 384) and does not change the training
#: measurably.
States = npt.NDArray[np.float16]


class _CachedStates(nn.Module):
    """Module in the place of the lower layers: it ignores its input and returns `states`, their cached output.

    The code of the model's other parts runs unchanged. So this code computes the masks and position biases that the
    upper layers need, for every architecture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: torch.Tensor | None = None
        #: Whether a layer of the model returns a tuple whose first item is the states; otherwise it returns the states.
        self.in_tuple = False

    def copy_attributes(self, layer: nn.Module) -> None:
        """Copy the attributes of the uppermost frozen layer. The model's code may read some, such as `attention_type`.

        Args:
            layer: that layer.
        """
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, *_inputs: object, **_options: object) -> torch.Tensor | tuple[torch.Tensor | None] | None:
        return (self.states,) if self.in_tuple else self.states


class TrainableEncoder:
    """An encoder with its pooling in PyTorch, prepared for training of its upper layers.

    Args:
        encoder: the encoder to load.

    Raises:
        ExportError: sentence-transformers cannot load the encoder, or its model has no list of layers.
    """

    def __init__(self, encoder: SourceEncoder) -> None:
        self.encoder = encoder
        self.model = load_sentence_transformer(encoder.folder)
        self.model.max_seq_length = encoder.max_tokens
        # Evaluation mode switches dropout off. Dropout made no measurable difference over the few epochs of a training.
        self.model.eval()
        self._transformer: Any = self.model[0].auto_model
        self._owner, self._name = self._find_layers()
        self._layers = list(getattr(self._owner, self._name))
        self._cached = _CachedStates()
        self._trained: dict[str, nn.Parameter] = {}
        self._original: dict[str, torch.Tensor] = {}
        self._frozen = 0
        self._cached.in_tuple = self._returns_tuples()

    @property
    def layers(self) -> int:
        """Number of layers of the encoder."""
        return len(self._layers)

    def _find_layers(self) -> tuple[nn.Module, str]:
        """Return the module that holds the list of layers, and the name of the list's attribute in that module.

        Raises:
            ExportError: no list has as many layers as the model's configuration states.
        """
        config = self._transformer.config
        count = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", None)
        for module in self._transformer.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    return module, name
        raise ExportError(
            f"{self.encoder.name} has no list of {count} layers that could be trained; use the strategy linear"
        )

    def _returns_tuples(self) -> bool:
        """Run a text of one token, and return whether a layer of the model returns its states in a tuple."""
        found: list[bool] = []
        hook = self._layers[0].register_forward_hook(
            lambda _module, _inputs, output: found.append(type(output) is tuple)
        )
        with torch.inference_mode():
            self._transformer(**self._features([[0]]))
        hook.remove()
        return found == [True]

    def tokenize(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the token ids of each text, special tokens included; texts above the encoder's limit are truncated.

        Texts are lower-cased first if the encoder needs it. No prompt is added.
        """
        given = [text.lower() for text in texts] if self.encoder.lower_case else list(texts)
        found: list[TokenIds] = self.model.tokenizer(
            given, truncation=True, max_length=self.encoder.max_tokens, return_attention_mask=False
        )["input_ids"]
        return found

    def train_top(self, top: int, *, embeddings: bool = True) -> dict[str, nn.Parameter]:
        """Restore the original weights, and make the upper `top` layers and all modules behind them trainable.

        Runs of the model need cached states of the lower layers from then on. Exception: if `top` is the number of
        layers, no states are needed.

        Args:
            top: number of upper layers to train.
            embeddings: whether all other parameters, such as the token embeddings, are trainable too if `top` is the
                number of layers.

        Returns:
            The trainable parameters, by name, without BERT's pooler.
        """
        self.reset()
        upper = self._layers[self.layers - top :]
        modules = [self.model] if embeddings and top == self.layers else [*upper, *list(self.model)[1:]]
        for module in modules:
            module.requires_grad_(True)
        self._trained = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            # Leave BERT's pooler out: it does not affect the token vectors.
            if parameter.requires_grad and "pooler" not in name.split(".")
        }
        self._original = self.weights()
        self._freeze(top)
        return self._trained

    def use(self, weights: Mapping[str, torch.Tensor], top: int) -> None:
        """Restore the original weights, then replace those that were trained, to embed texts with them.

        Args:
            weights: trained weights by name, as the method `weights` returned them after a training.
            top: number of upper layers that were trained. Cached states take the place of the other layers.
        """
        self.reset()
        self._trained = {name: parameter for name, parameter in self.model.named_parameters() if name in weights}
        self._original = self.weights()
        self.load(weights)
        self._freeze(top)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return copies of the parameters that `train_top` made trainable, by name."""
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy weights, by name, into the parameters that `train_top` made trainable; ignore other names.

        Raises:
            KeyError: `weights` lacks one of these parameters.
        """
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])

    def reset(self) -> None:
        """Restore the original weights; run all layers from now on, with no parameter trainable."""
        self.load(self._original)
        self._trained, self._original = {}, {}
        self.model.requires_grad_(False)
        self._freeze(self.layers)

    def _freeze(self, top: int) -> None:
        """Let the model run only the upper `top` layers from now on; cached states take the place of the others."""
        self._frozen = self.layers - top
        upper = self._layers[self._frozen :]
        if self._frozen:
            self._cached.copy_attributes(self._layers[self._frozen - 1])
        setattr(self._owner, self._name, nn.ModuleList([self._cached, *upper] if self._frozen else upper))

    @contextmanager
    def all_layers(self) -> Iterator[None]:
        """Run all layers inside the block, with the current weights, for texts without cached states.

        After the block, cached states take the place of the frozen layers again.
        """
        top = self.layers - self._frozen
        self._freeze(self.layers)
        try:
            yield
        finally:
            self._freeze(top)

    def lower_states(self, tokens: Sequence[TokenIds], top: int, progress: Progress = no_progress) -> list[States]:
        """Run the layers below the upper `top` with the original weights; return the hidden states after them.

        This restores the original weights; trained weights are lost.

        Args:
            tokens: token ids of each text.
            top: number of upper layers that do not run; fewer than the encoder has.
            progress: called with the number of texts done.

        Returns:
            The states of each text, float16 (tokens, hidden size).
        """
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
            states: states of each text from `lower_states`; None if no layer is frozen.

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
        """Embed texts in batches with the current weights, without gradients.

        Args:
            tokens: token ids of each text; at least one text.
            states: states of each text from `lower_states`; None if no layer is frozen.
            progress: called with the number of texts done.

        Returns:
            float32 (texts, dimensions), in the order of `tokens`.

        Raises:
            ValueError: layers are frozen and `states` is None.
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
            weights: trained weights by name, as the method `weights` returned them after the training.
            top: number of upper layers that were trained.
            folder: folder to write to.

        Raises:
            ExportError: the folder cannot be written.
            OSError: the disk is full.
        """
        self.use(weights, top)
        self._freeze(self.layers)
        with calling_libraries(f"the tuned {self.encoder.name} cannot be written", "is there free space on the disk?"):
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
    """Yield the indexes of texts in batches of `size` texts of similar numbers of tokens, the shortest texts first."""
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
