"""How to call an ONNX graph: the role of each input, the output to read, and a text's vector or logits from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emberpc.bundle.errors import BundleError, UnstatedError
from emberpc.bundle.manifest import Task

POOLINGS = ("mean", "cls", "max", "lasttoken")
#: Names of outputs with a vector for each text, the preferred name first.
_VECTORS = ("sentence_embedding", "text_embeds", "embeddings", "embedding")
#: Names of outputs with a vector for each token, the preferred name first.
_TOKENS = ("last_hidden_state", "token_embeddings")
#: Name of an output that is not chosen as the vector of a text unless the user states it: BERT's pooler was trained to
#: predict whether one sentence follows another.
_POOLER = "pooler_output"
_LOGITS = "logits"
#: Known names of inputs in lower case, by role. A role is not guessed from a part of a name: an earlier version guessed
#: in this way, and fed zeros to inputs for positions.
_ROLE_NAMES = {
    "input_ids": ("input_ids", "ids", "tokens", "token_ids", "input_tokens", "input_token_ids", "input_word_ids"),
    "attention_mask": ("attention_mask", "mask", "input_mask", "padding_mask", "attn_mask"),
    "token_type_ids": ("token_type_ids", "token_types", "segment_ids", "segments", "input_type_ids", "type_ids"),
    "position_ids": ("position_ids", "positions", "pos_ids"),
}
#: Roles of the inputs for which the server can compute values.
ROLES = tuple(_ROLE_NAMES)
#: Roles that the model option `inputs` may state by the order of the names alone, without `ROLE=`.
_IN_ORDER = ROLES[:3]
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
#: Minimum divisor of a mean and of a normalization, so that nothing is divided by 0. sentence-transformers uses the
#: same number for the mean.
_TINY = 1e-9

#: Fusions of ONNX Runtime to leave out when a model is loaded (`disabled_optimizers` of an InferenceSession). Its fused
#: addition and layer normalization takes four times the CPU time of the two operators (ONNX Runtime 1.32, one thread):
#: 8 % of an int8 model's time on batches, 10 % of that of an fp32 model (docs/decisions/0029).
SLOW_FUSIONS = ("SkipLayerNormFusion",)

Integers = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]


#: ONNX Runtime's names of the element types, by OpenVINO's names.
_OPENVINO_TYPES = {"i64": "tensor(int64)", "i32": "tensor(int32)", "f32": "tensor(float)", "f16": "tensor(float16)"}
#: Ending that OpenVINO appends to the name of an output.
_SINK = "/sink_port_0"


@dataclass(frozen=True)
class Tensor:
    """An input or output of an ONNX graph.

    `type` is ONNX Runtime's name, such as `tensor(int64)`. `shape` has the size of each axis: an int if it is fixed,
    else a name or None.
    """

    name: str
    type: str
    shape: Sequence[int | str | None]


@dataclass(frozen=True)
class Graph:
    """The inputs and outputs of an ONNX graph, in the graph's order."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]

    @classmethod
    def of_onnx_runtime(cls, session: Any) -> Graph:
        """Return the graph of a model that ONNX Runtime has loaded, an `onnxruntime.InferenceSession`."""
        inputs, outputs = session.get_inputs(), session.get_outputs()
        return cls(
            [Tensor(node.name, node.type, node.shape) for node in inputs],
            [Tensor(node.name, node.type, node.shape) for node in outputs],
        )

    @classmethod
    def of_openvino(cls, model: Any) -> Graph:
        """Return the graph of a model that OpenVINO has read, an `openvino.Model`."""
        return cls(
            [_openvino_tensor(port, port.node.get_friendly_name()) for port in model.inputs],
            [_openvino_tensor(port, port.node.get_friendly_name().removesuffix(_SINK)) for port in model.outputs],
        )


def _openvino_tensor(port: Any, name: str) -> Tensor:
    kind = port.element_type.to_string()
    shape = [None if size.is_dynamic else size.get_length() for size in port.partial_shape]
    return Tensor(name, _OPENVINO_TYPES.get(kind, kind), shape)


@dataclass(frozen=True)
class Inputs:
    """Names of a graph's inputs by role; a name is empty if the graph has no input of that role.

    `integers` is the type of all inputs, `int64` or `int32`. `first_position` is the position of a text's first token;
    it is 0 and not used if the graph has no input for positions.
    """

    input_ids: str
    attention_mask: str
    token_type_ids: str
    integers: str
    position_ids: str = ""
    first_position: int = 0

    def roles(self) -> dict[str, str | int]:
        """Return the names of the graph's inputs by role, without roles that no input has.

        If there is an input for positions, the result also has the int `first_position`.
        """
        found: dict[str, str | int] = {role: getattr(self, role) for role in ROLES if getattr(self, role)}
        return found | ({"first_position": self.first_position} if self.position_ids else {})

    def feeds(self, input_ids: Integers, mask: Integers) -> dict[str, npt.NDArray[np.integer]]:
        """Return the values of the graph's inputs for a batch, by the input's name.

        Each value is an array (texts, tokens) of the type `integers`. Token types are zeros. Positions count a text's
        tokens from `first_position`; padding has the position of the token beside it.

        Args:
            input_ids: token ids, int64 (texts, tokens).
            mask: int64 (texts, tokens), 1 for each token and 0 for padding.
        """
        named = {self.input_ids: input_ids, self.attention_mask: mask, self.token_type_ids: np.zeros_like(mask)}
        if self.position_ids:
            named[self.position_ids] = np.maximum(mask.cumsum(axis=1) - 1, 0) + self.first_position
        return {name: values.astype(self.integers, copy=False) for name, values in named.items() if name}


@dataclass(frozen=True)
class Interface:
    """How to call a graph: its inputs, the name of the output to read, and what to do with this output.

    `pooling`, one of `POOLINGS`, makes one vector from the vectors of a text's tokens; empty: the output already has a
    vector, or logits, for each text. `normalize`: whether to scale vectors to length 1 after the pooling.
    """

    inputs: Inputs
    output: str
    pooling: str = ""
    normalize: bool = False

    def legacy_text(self) -> str:
        """Return a text of this object that fingerprints of the old scheme cover, through `Manifest.weights_sha256`.

        The text must never change, since collections store fingerprints of the old scheme. It lacks the fields for
        positions, which were added later.
        """
        inputs = self.inputs
        return (
            f"Interface(inputs=Inputs(input_ids={inputs.input_ids!r}, attention_mask={inputs.attention_mask!r}, "
            f"token_type_ids={inputs.token_type_ids!r}, integers={inputs.integers!r}), output={self.output!r}, "
            f"pooling={self.pooling!r}, normalize={self.normalize!r})"
        )

    def finish(self, output: npt.NDArray[np.floating], mask: npt.NDArray[np.integer]) -> Matrix:
        """Turn the output of a batch into a vector, or logits, for each text.

        Args:
            output: float (texts, dimensions or labels), or float (texts, tokens, dimensions) if there is a pooling.
            mask: int (texts, tokens), 1 for each token and 0 for padding.

        Returns:
            float32 (texts, dimensions or labels).

        Raises:
            UnstatedError: the output has a vector for each token, and there is no pooling.
            BundleError: the output has another number of axes than stated above.
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
    """Pool the vectors of the tokens of each text to one vector, as sentence-transformers does.

    Args:
        tokens: vectors of the tokens, float32 (texts, tokens, dimensions).
        mask: int (texts, tokens), 1 for each token and 0 for padding. Each text has at least one token.
        pooling: `mean`, `cls` (the first token's vector), `max` (in each dimension) or `lasttoken`.

    Returns:
        float32 (texts, dimensions).
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


def find_inputs(graph: Graph, stated: str = "", first_position: int | None = None) -> Inputs:
    """Find the role of each input of a graph, by the input's name or as the user states it.

    Args:
        graph: the graph.
        stated: the model option `inputs`: `ROLE=NAME` of each input, separated by colons; or, for at most three inputs,
            the names of all inputs without roles, in the order of `ROLES`. If one of these names has a known role, each
            must have the role of its place. Empty: roles are found by name.
        first_position: position of a text's first token; None: unknown.

    Returns:
        The names of the inputs by role.

    Raises:
        UnstatedError: without `stated`, if the role of an input is unknown, two inputs have the same role, or none is
            for token ids; the error has the model option that states the roles.
        BundleError: the inputs are not all int64 or all int32, `stated` is wrong, or there is an input for positions
            and `first_position` is None.
    """
    names = [tensor.name for tensor in graph.inputs]
    types = {tensor.type for tensor in graph.inputs}
    if len(types) != 1 or not types <= set(_INTEGERS):
        raise BundleError(
            f"the inputs {', '.join(names)} are of the types {', '.join(sorted(types))}; "
            "a text encoder's are all int64 or all int32: export the model again"
        )
    by_role = _stated_roles(stated, names) if stated else _known_roles(names)
    if "position_ids" in by_role and first_position is None:
        raise BundleError(
            f"the input {by_role['position_ids']} takes positions, and config.json states no model_type, which decides "
            "where they start; add it"
        )
    return Inputs(
        input_ids=by_role["input_ids"],
        attention_mask=by_role.get("attention_mask", ""),
        token_type_ids=by_role.get("token_type_ids", ""),
        integers=np.dtype(_INTEGERS[types.pop()]).name,
        position_ids=by_role.get("position_ids", ""),
        first_position=(first_position or 0) if "position_ids" in by_role else 0,
    )


def _known_roles(names: Sequence[str]) -> dict[str, str]:
    """Infer the role of each input of a graph from the input's name; return the names of the inputs by role.

    Raises:
        UnstatedError: a name has no known role, two names have the same role, or no input is for token ids.
    """
    found = {role: name for name in names if (role := _role(name))}
    if len(found) < len(names) or "input_ids" not in found:
        unknown = [name for name in names if name not in found.values()] or names
        raise UnstatedError(
            f"the roles of the inputs {', '.join(unknown)} are unknown; the server can give {', '.join(ROLES)}, and "
            "nothing else",
            "inputs=" + ":".join(f"{role}={found.get(role, 'NAME')}" for role in ROLES[: max(len(names), 1)]),
        )
    return found


def _stated_roles(stated: str, names: Sequence[str]) -> dict[str, str]:
    """Read the roles of a graph's inputs from the option `inputs`; return the names of the inputs by role.

    Raises:
        BundleError: the option does not give each input exactly one role, names another input or an unknown role, gives
            a role twice, or gives no input the role `input_ids`; or it has names without roles that `find_inputs` does
            not allow.
    """
    entries = [entry for entry in stated.split(":") if entry]
    pairs = [(role, name) for role, equals, name in (entry.partition("=") for entry in entries) if equals]
    if not pairs:
        # Names without roles are read in the order of `ROLES`, but only if no name has a known role, or each name has
        # the role of its place. Otherwise, for example, an input for positions in the third place would be fed zeros.
        pairs = list(zip(ROLES, entries, strict=False))
        roles = [_role(name) for _, name in pairs]
        if len(entries) > len(_IN_ORDER) or (any(roles) and roles != [role for role, _ in pairs]):
            right = ":".join(f"{_role(name) or 'ROLE'}={name}" for name in entries)
            raise BundleError(
                f"the option inputs is {stated!r}; state the role of each input: inputs={right}; roles are "
                f"{', '.join(ROLES)}"
            )
    roles = [role for role, _ in pairs]
    if unknown := [role for role in roles if role not in ROLES]:
        raise BundleError(f"the option inputs has the role {unknown[0]!r}; roles are {', '.join(ROLES)}")
    if len(pairs) != len(entries) or len(set(roles)) != len(roles) or "input_ids" not in roles:
        raise BundleError(
            f"the option inputs is {stated!r}; it must be ROLE=NAME:ROLE=NAME with each role once and with input_ids"
        )
    if sorted(name for _, name in pairs) != sorted(names):
        raise BundleError(
            f"the option inputs names {', '.join(name for _, name in pairs)}; the inputs are {', '.join(names)}"
        )
    return dict(pairs)


def _role(name: str) -> str:
    """Return the role of an input by its name, without regard to case or a suffix such as `:0`; empty if unknown."""
    plain = name.lower().partition(":")[0]  # TensorFlow's names end with `:0`
    return next((role for role, known in _ROLE_NAMES.items() if plain in known), "")


def find_output(graph: Graph, task: Task | None, stated: str = "") -> Tensor:
    """Return the output of a graph to read. Only outputs whose type begins with `tensor(float` count.

    A stated output is returned for any task. Otherwise: for a classifier, this is the output `logits`. For an embedding
    model, it is an output named in `_VECTORS`, else in `_TOKENS`; earlier names take precedence. If there is none,
    it is the only output with two axes, else with three axes; `pooler_output` and `logits` do not count here.

    Args:
        graph: the graph.
        task: the model's task; None: a classifier if there is an output `logits`, else an embedding model.
        stated: the model option `output`, a name; empty: find the output.

    Raises:
        BundleError: there is no output `stated` of a float type.
        UnstatedError: none of these rules finds an output; the error has the model option that states the output.
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
    raise UnstatedError(f"it is unknown which of the outputs {', '.join(outputs)} holds the vectors", "output=NAME")
