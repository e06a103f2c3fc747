"""Parse an ONNX file without ONNX Runtime: find its weight files, and hash all that decides one of its outputs."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from emberpc.bundle.contents import Contents
from emberpc.bundle.errors import BundleError
from emberpc.bundle.hashing import sha256_of_part
from emberpc.bundle.paths import is_inside
from emberpc.bundle.protobuf import Message

# Field numbers of onnx.proto; `_EXTERNAL` is the value EXTERNAL of the field TensorProto.data_location.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTION = 7, 8, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_SPARSE = 1, 5, 11, 15
_FUNCTION_NODE = 7
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN, _NODE_OVERLOAD = 1, 2, 4, 5, 7, 8
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_SPARSE_VALUES, _SPARSE_INDICES = 1, 2
_TENSOR_NAME, _TENSOR_DOCUMENTATION, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 8, 12, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VALUE_NAME = 1
_EXTERNAL = 1
#: Greatest depth of nested graphs (graphs inside operators) that is read; a file with deeper ones is refused, since it
#: could exhaust Python's stack. Real models are far below this depth.
_MAX_DEPTH = 16
#: Magic bytes, from the fifth byte on, of ONNX Runtime's own format, a FlatBuffer.
_ORT_FORMAT = b"ORTM"
#: Minimum number of bytes of a part of the ONNX file that is hashed by `hash_part`. A smaller part is copied and
#: hashed; to copy a larger part from a memory-mapped file would be slow.
_LARGE_BYTES = 1 << 16


_HashPart = Callable[..., bytes]


class _IrregularError(Exception):
    """`_Digests` cannot compute the digest of this output, so the digest must cover all bytes of the model's files."""


def external_files(folder: Path, model: str, contents: Contents | None = None) -> tuple[str, ...]:
    """Return the external weight files of an ONNX file, sorted; none for a file in ONNX Runtime's own format.

    Args:
        folder: the model's folder; no file may lie outside it.
        model: the ONNX file, as a path in the folder.
        contents: reads the ONNX file; None: it is read from disk.

    Returns:
        Paths relative to the folder, with slashes.

    Raises:
        BundleError: the ONNX file cannot be read, or a file that it names is missing or lies outside the folder.
    """
    with _opened(folder / model, contents) as data:
        names = set() if _is_ort_format(data) else set(_locations(Message(data, 0, len(data))))
    return tuple(sorted(_place(folder, model, name) for name in names))


def external_locations(path: Path, contents: Contents) -> tuple[str, ...]:
    """Return the locations of external weights, as an ONNX file states them relative to itself, sorted.

    The files at these locations are not checked, in contrast to `external_files`.

    Args:
        path: the ONNX file. A file in ONNX Runtime's own format has no external weights.
        contents: reads the ONNX file.

    Raises:
        BundleError: the ONNX file cannot be read, or has external weights where ONNX Runtime cannot read them
            from memory: anywhere but in an initializer or a Constant of the main graph.
    """
    with _opened(path, contents) as data:
        if _is_ort_format(data):
            return ()
        model = Message(data, 0, len(data))
        plain = [name for graph in model.messages(_MODEL_GRAPH) for name in _plain_locations(graph)]
        if len(plain) != sum(1 for _ in _locations(model)):
            raise BundleError(
                f"{path} keeps weights of a graph inside an operator, of a function or of a sparse tensor in another "
                "file; save the model as one ONNX file"
            )
    return tuple(sorted(set(plain)))


def output_digest(folder: Path, model: str, output: str, contents: Contents | None = None) -> str:
    """Return a SHA-256 (hex) of everything that decides an output of an ONNX graph.

    The digest covers the operators that the output depends on, with their attributes, weights (in the ONNX file or in
    external files) and names of graph inputs, and the versions of the operator sets. Names of other values, other
    outputs, and the documentation of the graph and its weights do not count. If the graph has no value of this name or
    has unsupported parts, such as loops or functions, or the file is in ONNX Runtime's own format, the digest covers
    all bytes of the ONNX file and its external files.

    Args:
        folder: the model's folder; no file may lie outside it.
        model: the ONNX file, as a path in the folder.
        output: the output's name.
        contents: reads the files; None: they are read from disk.

    Raises:
        BundleError: the ONNX file cannot be read, or a file that it names is missing, too short or outside the folder.
    """
    hash_part = sha256_of_part if contents is None else contents.sha256_of_part
    try:
        with _opened(folder / model, contents) as data:
            return _Digests.read(folder, model, data, hash_part).digest_of(output).hex()
    except _IrregularError:
        digest = hashlib.sha256(b"files")
        for name in (model, *external_files(folder, model, contents)):
            _update(digest, b"" if name == model else name.encode(), hash_part(folder / name))
        return digest.hexdigest()


@contextmanager
def _opened(path: Path, contents: Contents | None) -> Iterator[bytes | mmap.mmap]:
    """Yield the bytes of an ONNX file.

    Raises:
        BundleError: the file cannot be read, or the block raised OSError, ValueError or OverflowError, as a parser does
            for damaged bytes.
    """
    try:
        if contents is not None:
            yield contents.read(path)
            return
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except (OSError, ValueError, OverflowError) as error:
        raise BundleError(f"{path} cannot be read as an ONNX file; get the model again or export it again") from error


def _is_ort_format(data: bytes | mmap.mmap) -> bool:
    return data[4:8] == _ORT_FORMAT


def _place(folder: Path, model: str, location: str) -> str:
    """Return the path of an external weight file, relative to the model's folder.

    Args:
        folder: the model's folder.
        model: the ONNX file, as a path in the folder.
        location: the weight file, as a path relative to the ONNX file.

    Raises:
        BundleError: the file is missing or lies outside the folder, or `location` is absolute or has `..`, a backslash
            or a NUL.
    """
    pure = PurePosixPath(model).parent / location
    outside = PurePosixPath(location).is_absolute() or ".." in pure.parts or "\\" in location or "\0" in location
    if outside or not is_inside(folder, pure):
        raise BundleError(
            f"{folder / model} takes weights from {location!r}, which leads out of the model's folder; copy the files "
            "there (cp -rL)"
        )
    if not (folder / pure).is_file():
        raise BundleError(f"{folder / pure} is missing, which holds weights of {folder / model}; get the model again")
    return str(pure)


def _locations(model: Message) -> Iterator[str]:
    """Yield the location, or an empty text, of each external tensor of a model. ValueError if the file is damaged."""
    for graph in model.messages(_MODEL_GRAPH):
        yield from _graph_locations(graph, 0)
    for training in model.messages(_MODEL_TRAINING):
        for part in (1, 2):  # initialization, algorithm
            for graph in training.messages(part):
                yield from _graph_locations(graph, 0)
    for function in model.messages(_MODEL_FUNCTION):
        for node in function.messages(_FUNCTION_NODE):
            yield from _node_locations(node, 0)


def _plain_locations(graph: Message) -> Iterator[str]:
    """Yield the location of each external dense initializer and Constant of a graph, not of graphs inside operators."""
    for tensor in graph.messages(_GRAPH_INITIALIZER):
        yield from _tensor_locations(tensor)
    for node in graph.messages(_GRAPH_NODE):
        if _text(node, _NODE_OPERATOR) == "Constant":
            for attribute in node.messages(_NODE_ATTRIBUTE):
                for tensor in attribute.messages(_ATTRIBUTE_TENSOR):
                    yield from _tensor_locations(tensor)


def _graph_locations(graph: Message, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs are nested too deep")
    for number, value in graph.fields():
        if not isinstance(value, Message):
            continue
        if number == _GRAPH_INITIALIZER:
            yield from _tensor_locations(value)
        elif number == _GRAPH_SPARSE:
            yield from _sparse_locations(value)
        elif number == _GRAPH_NODE:
            yield from _node_locations(value, depth)


def _node_locations(node: Message, depth: int) -> Iterator[str]:
    for attribute in node.messages(_NODE_ATTRIBUTE):
        for number, value in attribute.fields():
            if not isinstance(value, Message):
                continue
            if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                yield from _tensor_locations(value)
            elif number in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
                yield from _sparse_locations(value)
            elif number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                yield from _graph_locations(value, depth + 1)


def _sparse_locations(sparse: Message) -> Iterator[str]:
    for part in (_SPARSE_VALUES, _SPARSE_INDICES):
        for tensor in sparse.messages(part):
            yield from _tensor_locations(tensor)


def _tensor_locations(tensor: Message) -> Iterator[str]:
    entries, external = storage_of(tensor)
    if external or entries:
        yield entries.get("location", "")


def storage_of(tensor: Message) -> tuple[dict[str, str], bool]:
    """Return the entries that locate a tensor's external file, and whether the tensor has its values in such a file.

    The entries are texts by key, as far as they are stated: `location` (the path), and `offset` and `length` in bytes.
    """
    entries: dict[str, str] = {}
    external = False
    for number, value in tensor.fields():
        if number == _TENSOR_LOCATION:
            external = value == _EXTERNAL
        elif number == _TENSOR_EXTERNAL and isinstance(value, Message):
            entries[_text(value, _ENTRY_KEY)] = _text(value, _ENTRY_VALUE)
    return entries, external


def _text(message: Message, wanted: int) -> str:
    """Return the text in the field number `wanted`: the last if the field is repeated; empty if it is missing."""
    found = [value.bytes().decode() for value in message.messages(wanted)]
    return found[-1] if found else ""


@dataclass(frozen=True)
class _Node:
    message: Message
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class _Digests:
    """Computes digests of a graph's values; the digest of a value covers everything that the value is computed from."""

    folder: Path
    model_path: str
    model: Message
    #: `sha256_of_part`, or a function with the same arguments and result that reads from memory.
    hash_part: _HashPart
    _initializers: dict[str, Message] = field(default_factory=dict)
    _inputs: set[str] = field(default_factory=set)
    _nodes: list[_Node] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, model: str, data: bytes | mmap.mmap, hash_part: _HashPart) -> _Digests:
        """Parse an ONNX file and collect the parts of its graph.

        Args:
            folder: the model's folder.
            model: the ONNX file, as a path in the folder.
            data: the bytes of the ONNX file, which the result reads later, too.
            hash_part: `sha256_of_part`, or a function with the same arguments and result.

        Raises:
            _IrregularError: the file is in ONNX Runtime's own format, or the graph has an unsupported part.
            ValueError: the bytes are damaged.
        """
        if _is_ort_format(data):
            raise _IrregularError
        return cls(folder, model, Message(data, 0, len(data)), hash_part)

    def __post_init__(self) -> None:
        """Collect the graph's initializers, inputs and nodes.

        Raises _IrregularError for functions, no or several graphs, and sparse or repeated initializers.
        """
        graphs = list(self.model.messages(_MODEL_GRAPH))
        if len(graphs) != 1 or any(True for _ in self.model.messages(_MODEL_FUNCTION)):
            raise _IrregularError
        for number, value in graphs[0].fields():
            if not isinstance(value, Message):
                continue
            if number == _GRAPH_INITIALIZER:
                name = _text(value, _TENSOR_NAME)
                if name in self._initializers:
                    raise _IrregularError
                self._initializers[name] = value
            elif number == _GRAPH_INPUT:
                self._inputs.add(_text(value, _VALUE_NAME))
            elif number == _GRAPH_NODE:
                texts = {kind: tuple(each.bytes().decode() for each in value.messages(kind)) for kind in (1, 2)}
                self._nodes.append(_Node(value, texts[_NODE_INPUT], texts[_NODE_OUTPUT]))
            elif number == _GRAPH_SPARSE:
                raise _IrregularError

    def digest_of(self, output: str) -> bytes:
        """Return a digest of everything that decides output `output`, and of the operator set versions.

        Raises:
            _IrregularError: the graph has no value of this name, or the value depends on an unsupported part.
            BundleError: see `_external`.
        """
        wanted, needed = {output}, list[_Node]()
        # ONNX requires that nodes are listed in the order of computation. So one pass from the end finds all nodes that
        # the output depends on.
        for node in reversed(self._nodes):
            if wanted.intersection(node.outputs):
                needed.append(node)
                wanted.update(filter(None, node.inputs))
        known = {"": hashlib.sha256(b"absent").digest()}
        for name in sorted(wanted):
            if name in self._initializers:
                known[name] = self._tensor(self._initializers[name])
            elif name in self._inputs:
                known[name] = _digest(b"input", name.encode())
        for node in reversed(needed):
            if any(name in known for name in node.outputs if name) or not all(name in known for name in node.inputs):
                raise _IrregularError
            own = self._node(node, [known[name] for name in node.inputs])
            known |= {name: _digest(b"value", own, str(i).encode()) for i, name in enumerate(node.outputs) if name}
        if output not in known:
            raise _IrregularError
        opsets = sorted(each.bytes() for each in self.model.messages(_MODEL_OPSET))
        return _digest(b"output", known[output], *opsets)

    def _node(self, node: _Node, inputs: Sequence[bytes]) -> bytes:
        message = node.message
        attributes = list(message.messages(_NODE_ATTRIBUTE))
        for attribute in attributes:
            for number, value in attribute.fields():
                graph = number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS)
                sparse = number in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES)
                tensor = number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS) and isinstance(value, Message)
                if graph or sparse or (tensor and isinstance(value, Message) and any(storage_of(value))):
                    raise _IrregularError
        kind = [_text(message, number).encode() for number in (_NODE_OPERATOR, _NODE_DOMAIN, _NODE_OVERLOAD)]
        outputs = bytes(bool(name) for name in node.outputs)
        return _digest(
            b"node",
            *kind,
            outputs,
            _digest(b"attributes", *sorted(each.bytes() for each in attributes)),
            _digest(b"inputs", *inputs),
        )

    def _tensor(self, tensor: Message) -> bytes:
        """Return the digest of a tensor's type, shape and values, whether in the ONNX file or in an external file.

        Raises:
            _IrregularError: the tensor names an external file but does not have its values there, or see `_external`.
            BundleError: see `_external`.
        """
        entries, external = storage_of(tensor)
        digest = hashlib.sha256(b"tensor")
        for number, value in tensor.fields():
            if number in (_TENSOR_NAME, _TENSOR_DOCUMENTATION, _TENSOR_EXTERNAL, _TENSOR_LOCATION):
                continue
            if isinstance(value, int):
                _update(digest, str(number).encode(), str(value).encode())
            else:
                _update(digest, str(number).encode(), self._sha256(value))
        if external:
            _update(digest, b"9", self._external(entries))  # 9: the field number of raw_data
        elif entries:
            raise _IrregularError
        return digest.digest()

    def _external(self, entries: dict[str, str]) -> bytes:
        """Return the SHA-256 of the part of an external file that has a tensor's values; `entries`: see `storage_of`.

        Raises:
            _IrregularError: offset or length are not numbers of at most 18 digits.
            BundleError: the file is missing, too short or outside the model's folder.
        """
        place = _place(self.folder, self.model_path, entries.get("location", ""))
        offset, length = entries.get("offset", "0"), entries.get("length", "")
        if not all(each.isascii() and each.isdecimal() and len(each) < 19 for each in (offset, length or "0")):
            raise _IrregularError
        return self.hash_part(self.folder / place, int(offset), int(length) if length else None)

    def _sha256(self, part: Message) -> bytes:
        """Return the SHA-256 of a part of the ONNX file.

        A large part is hashed by `hash_part`: to copy it from a memory-mapped file would load it page by page.
        """
        length = part.end - part.start
        if length < _LARGE_BYTES:
            return hashlib.sha256(part.bytes()).digest()
        return self.hash_part(self.folder / self.model_path, part.start, length)


def _digest(kind: bytes, *parts: bytes) -> bytes:
    digest = hashlib.sha256(kind)
    _update(digest, *parts)
    return digest.digest()


def _update(digest: hashlib._Hash, *parts: bytes) -> None:
    """Add parts to a digest, each after its length, so that different lists of parts never add the same bytes."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
