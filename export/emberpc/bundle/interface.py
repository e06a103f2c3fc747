"""How to call an ONNX graph: which of its inputs takes what, and how its output becomes a vector for each text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emberpc.bundle.errors import BundleError, UnstatedError
from emberpc.bundle.manifest import Task

POOLINGS = ("mean", "cls", "max", "lasttoken")
#: Outputs that are known to hold a text's vector, and those that hold a vector for each token; the first one counts.
_VECTORS = ("sentence_embedding", "text_embeds", "embeddings", "embedding")
_TOKENS = ("last_hidden_state", "token_embeddings")
#: BERT's pooler was trained to tell whether one sentence follows another: no model means it as a text's vector.
_POOLER = "pooler_output"
_LOGITS = "logits"
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
#: What sentence-transformers divides by at least.
_TINY = 1e-9

Integers = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph: its type as ONNX Runtime writes it, its dimensions, int where they are fixed."""

    name: str
    type: str
    shape: Sequence[int | str | None]


@dataclass(frozen=True)
class Graph:
    """What a graph takes and gives, in its order."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


@dataclass(frozen=True)
class Inputs:
    """The names of a graph's inputs, empty where it has none such, and of which integers they are, such as `int64`."""

    input_ids: str
    attention_mask: str
    token_type_ids: str
    integers: str

    def roles(self) -> dict[str, str]:
        """Return the name of the input that has each role, without roles that no input has."""
        return {role: name for role, name in vars(self).items() if name and role != "integers"}

    def feeds(self, input_ids: Integers, mask: Integers) -> dict[str, npt.NDArray[np.integer]]:
        """Return what the graph takes for a batch; both are int64 (texts, tokens), the mask 1 where a token is."""
        named = {self.input_ids: input_ids, self.attention_mask: mask, self.token_type_ids: np.zeros_like(mask)}
        return {name: values.astype(self.integers, copy=False) for name, values in named.items() if name}


@dataclass(frozen=True)
class Interface:
    """How to call a graph: its inputs, and the name of the output that is asked for.

    `pooling` says how the vectors of the tokens become one of the text; empty:
    the graph did that. `normalize`: give vectors length 1.
    """

    inputs: Inputs
    output: str
    pooling: str = ""
    normalize: bool = False

    def legacy_text(self) -> str:
        """Return the text that stood for this in fingerprints of the old scheme; it must never change."""
        inputs = self.inputs
        return (
            f"Interface(inputs=Inputs(input_ids={inputs.input_ids!r}, attention_mask={inputs.attention_mask!r}, "
            f"token_type_ids={inputs.token_type_ids!r}, integers={inputs.integers!r}), output={self.output!r}, "
            f"pooling={self.pooling!r}, normalize={self.normalize!r})"
        )

    def finish(self, output: npt.NDArray[np.floating], mask: npt.NDArray[np.integer]) -> Matrix:
        """Turn the output of a batch into a vector, or logits, for each text.

        Args:
            output: (texts, width), or (texts, tokens, width) if there is a pooling.
            mask: (texts, tokens), 1 where a token is.

        Returns:
            float32 (texts, width).

        Raises:
            BundleError: the output is of another shape.
        """
        found = np.asarray(output, dtype=np.float32)
        if found.ndim == 3 and not self.pooling:
            raise UnstatedError(f"the output {self.output} has a vector for each token", "pooling=mean")
        if found.ndim != (3 if self.pooling else 2):
            raise BundleError(
                f"the output {self.output} has {found.ndim} dimensions; it must have a vector for each text"
            )
        if self.pooling:
            found = pool(found, mask, self.pooling)
        if self.normalize:
            found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), _TINY)
        return found


def pool(tokens: Matrix, mask: npt.NDArray[np.integer], pooling: str) -> Matrix:
    """Make one vector of those of a text's tokens, as sentence-transformers does.

    Args:
        tokens: float32 (texts, tokens, width).
        mask: (texts, tokens), 1 where a token is.
        pooling: one of `POOLINGS`.

    Returns:
        float32 (texts, width).
    """
    there = mask[:, :, None].astype(np.float32)
    if pooling == "mean":
        return np.asarray((tokens * there).sum(axis=1) / np.maximum(there.sum(axis=1), _TINY), dtype=np.float32)
    if pooling == "max":
        return np.asarray(np.where(there > 0, tokens, -np.inf).max(axis=1), dtype=np.float32)
    rows = np.arange(len(tokens))
    if pooling == "cls":
        return np.asarray(tokens[rows, mask.argmax(axis=1)])
    return np.asarray(tokens[rows, mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)])


def find_inputs(graph: Graph, stated: Sequence[str] = ()) -> Inputs:
    """Tell by their names which input takes what.

    Args:
        graph: the graph.
        stated: the names, in the order token ids, mask, token types; nothing: to be found out.

    Raises:
        BundleError: an input is none of a text encoder, or cannot be told; the message says which option states it.
    """
    names = [tensor.name for tensor in graph.inputs]
    types = {tensor.type for tensor in graph.inputs}
    if len(types) != 1 or not types <= set(_INTEGERS):
        raise BundleError(
            f"the inputs {', '.join(names)} are of the types {', '.join(sorted(types))}; "
            "a text encoder's are all int64 or all int32: export the model again"
        )
    roles = ("input_ids", "attention_mask", "token_type_ids")
    if stated:
        if set(stated) != set(names) or len(stated) > len(roles):
            raise BundleError(f"the option inputs names {', '.join(stated)}; the inputs are {', '.join(names)}")
        found = dict(zip(stated, roles, strict=False))
    else:
        found = {name: _role(name) for name in names}
        if len(set(found.values())) < len(names) or "input_ids" not in found.values():
            raise UnstatedError(f"what the inputs {', '.join(names)} take cannot be told", f"inputs={':'.join(names)}")
    by_role = {role: name for name, role in found.items()}
    return Inputs(**{role: by_role.get(role, "") for role in roles}, integers=np.dtype(_INTEGERS[types.pop()]).name)


def _role(name: str) -> str:
    """Guess what an input takes; empty if its name does not tell."""
    lower = name.lower()
    if "mask" in lower:
        return "attention_mask"
    if "type" in lower or "segment" in lower:
        return "token_type_ids"
    return "input_ids" if "id" in lower or "token" in lower else ""


def find_output(graph: Graph, task: Task | None, stated: str = "") -> Tensor:
    """Tell which output to ask for: an embedder's vector of a text, or else those of its tokens; a classifier's logits.

    Args:
        graph: the graph.
        task: what the model does; None: whatever its outputs are for.
        stated: the output's name; empty: to be found out.

    Raises:
        BundleError: there is none, or several might be meant; the message says which option states it.
    """
    outputs = {tensor.name: tensor for tensor in graph.outputs if tensor.type.startswith("tensor(float")}
    if stated:
        if stated not in outputs:
            raise BundleError(f"the option output is {stated}; the outputs are {', '.join(outputs)}")
        return outputs[stated]
    if task is not Task.EMBEDDING and _LOGITS in outputs:
        return outputs[_LOGITS]
    if task is Task.CLASSIFICATION:
        raise UnstatedError(f"no output is called {_LOGITS}; there are {', '.join(outputs)}", "output=NAME")
    for name in (*_VECTORS, *_TOKENS):
        if name in outputs:
            return outputs[name]
    for rank in (2, 3):
        fitting = [t for t in outputs.values() if len(t.shape) == rank and t.name not in (_POOLER, _LOGITS)]
        if len(fitting) == 1:
            return fitting[0]
    raise UnstatedError(f"which of the outputs {', '.join(outputs)} holds the vectors cannot be told", "output=NAME")
