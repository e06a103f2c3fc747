"""Read a foreign folder, which has no manifest, from its files, its graph and the user's model options.

Tools such as sentence-transformers and optimum write foreign folders. These hold `tokenizer.json`, `config.json` and an
ONNX file, which lies beside them or in `onnx/`. Folders of embedding models often hold `modules.json`,
`1_Pooling/config.json` and `config_sentence_transformers.json`, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from emberpc.bundle.contents import Contents
from emberpc.bundle.errors import BundleError, UnstatedError
from emberpc.bundle.interface import POOLINGS, Graph, Interface, Tensor, find_inputs, find_output
from emberpc.bundle.limits import MAX_DIMENSIONS, MAX_TEXT_LENGTH, MAX_TOKENS, check_length, whole_number
from emberpc.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest, Parity, Prompts, Task, Variant
from emberpc.bundle.onnx_file import external_files
from emberpc.bundle.paths import is_inside
from emberpc.bundle.peers import (
    ADAPTER_CONFIG,
    read_dimensions,
    read_first_position,
    read_json,
    read_labels,
    read_max_tokens,
    read_modules,
    read_name,
    read_pooling,
    read_prompts,
    read_sentence_transformers,
    read_token_id,
    transformer_folder,
)
from emberpc.bundle.reading import TOKENIZER_NAME, Bundle, read_bundle, sha256_of
from emberpc.bundle.tokenizer_settings import check_tokenizer

#: Texts on which a model without reference outputs is tried, alone and in one batch. Their lengths differ, so that the
#: batch is padded.
PROBES = (
    "a kitten asleep on the sofa",
    "Interest rates rose again this spring, and lenders expect another rise before the year is out.",
    "yes",
)
#: Name of the only variant of a foreign folder.
VARIANT = "onnx"
_MODULES = ("Transformer", "Pooling", "Normalize")
#: Modules that the server does not run, but that an export can put into the graph. An export refuses all other modules.
_EXPORTED = ("Dense",)


@dataclass(frozen=True)
class Stated:
    """Model options: settings that the user states for a foreign model. An empty setting is read from the folder.

    `pooling` is one of `POOLINGS`; a stated pooling also means that the model is no classifier. `output` is the name of
    an output of the graph.
    """

    #: The ONNX file, as a path in the folder.
    file: str = ""
    #: Role and name of each input as `ROLE=NAME`, separated by colons; see `emberpc.bundle.interface.find_inputs`.
    inputs: str = ""
    output: str = ""
    pooling: str = ""
    #: `yes` or `no`: whether vectors are normalized to length 1.
    normalize: str = ""
    max_tokens: str = ""
    dimensions: str = ""
    query_prompt: str = ""
    passage_prompt: str = ""

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> Stated:
        """Validate model options, given by name, and return them.

        Raises:
            BundleError: an option is unknown, or its value is not allowed. `pooling` and `normalize` may be missing,
                but not empty.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise BundleError(f"there is no model option {unknown[0]!r}; there are: {', '.join(known)}")
        takes = {"pooling": POOLINGS, "normalize": ("yes", "no")}
        for name, values in takes.items():
            if options.get(name, values[0]) not in values:
                raise BundleError(f"the model option {name} is {options[name]!r}; it is one of {', '.join(values)}")
        for name, most in (("max_tokens", MAX_TOKENS), ("dimensions", MAX_DIMENSIONS)):
            if options.get(name):
                whole_number(options[name], f"the model option {name}", 1, most)
        for name, text in options.items():
            check_length(text, f"the model option {name}", MAX_TEXT_LENGTH)
        return cls(**options)


def open_bundle(
    folder: Path,
    options: Mapping[str, str],
    look: Callable[[Path], Graph],
    *,
    check_hashes: bool = True,
    contents: Contents | None = None,
) -> Bundle:
    """Read a bundle, or a foreign folder as if it were a bundle.

    Args:
        folder: the folder.
        options: model options of a foreign folder, by the names of the fields of `Stated`; none for a bundle.
        look: loads an ONNX file and returns its inputs and outputs; it is not called for a bundle. Its errors are
            raised as they are.
        check_hashes: whether to compare the SHA-256 of each file of a bundle with the manifest, and not only its size.
        contents: reads the tokenizer and the weights of a foreign folder; None: they are read from disk.

    Raises:
        BundleError: the folder is neither a bundle nor a foreign folder, a file or setting is missing, wrong or not
            supported, or options were given for a bundle or are wrong.
        UnstatedError: a foreign folder lacks a setting; the error has the model option that states the setting.
    """
    if not folder.is_dir() or (folder / MANIFEST_NAME).exists():
        bundle = read_bundle(folder, check_hashes=check_hashes)
        if options:
            raise BundleError(f"{folder} is a bundle, whose manifest has all settings; leave out the model options")
        return bundle
    return read_foreign(folder, Stated.parse(options), look, contents)


def read_foreign(
    folder: Path, stated: Stated, look: Callable[[Path], Graph], contents: Contents | None = None
) -> Bundle:
    """Read a foreign folder, which has no manifest, and infer its manifest.

    The model is a classifier if the graph has an output `logits`, unless there is a `modules.json` or a stated pooling.

    Args:
        folder: the folder.
        stated: the model options that the user gave.
        look: loads an ONNX file and returns its inputs and outputs; it may raise other errors.
        contents: reads the tokenizer and the files with weights; None: they are read from disk.

    Returns:
        A bundle without reference outputs. The hashes in its manifest are computed from the files now.

    Raises:
        BundleError: a file is missing, lies outside the folder or cannot be read; an option is wrong; or a setting, the
            graph or the tokenizer is not supported.
        UnstatedError: the folder lacks a setting; the error has the model option that states the setting.
    """
    model = _model_file(folder, stated.file)
    _plain(folder, TOKENIZER_NAME)
    if not (folder / TOKENIZER_NAME).is_file():
        raise BundleError(
            f"{folder} has no {TOKENIZER_NAME}; save the model's tokenizer there, with transformers: "
            "AutoTokenizer.from_pretrained(MODEL, use_fast=True).save_pretrained(DIR)"
        )
    settings = read_sentence_transformers(folder)
    external = external_files(folder, model, contents)  # before the file is loaded: none may lie outside the folder
    graph = look(folder / model)
    config = read_json(folder / "config.json") or read_json(transformer_folder(folder) / "config.json")
    # Labels in config.json do not make a model a classifier: transformers gives each model two default labels, which
    # some config.json files have.
    classifies = stated.output == "logits" or any(tensor.name == "logits" for tensor in graph.outputs)
    task = Task.CLASSIFICATION if classifies and not (stated.pooling or _is_embedder(folder)) else Task.EMBEDDING
    output = find_output(graph, task, stated.output)
    interface, pooling = _interface(folder, graph, config, task, output, stated)
    check_tokenizer(folder, feeds_types=bool(interface.inputs.token_type_ids), contents=contents)
    # The fingerprint of the old scheme covers only weight files with this pattern of names. These files are hashed here
    # even if the ONNX file does not name them, and so are all external weight files.
    named = {str(path.relative_to(folder)) for path in (folder / model).parent.glob(f"{Path(model).name}_data*")}
    for name in named:
        _plain(folder, name)
    names = [TOKENIZER_NAME, model, *sorted(named | set(external))]
    entries = {name: FileEntry(sha256_of(folder / name, contents), (folder / name).stat().st_size) for name in names}
    weights = hashlib.sha256("".join(entries[name].sha256 for name in names[1:]).encode())
    weights.update(interface.legacy_text().encode())
    manifest = Manifest(
        task=task,
        base_model=read_name(config, folder),
        revision=weights.hexdigest()[:12],
        weights_sha256=weights.hexdigest(),
        dimensions=_dimensions(config, output, task, stated),
        pooling=pooling,
        normalize=interface.normalize,
        max_tokens=_max_tokens(folder, config, stated),
        max_tokens_stated=bool(stated.max_tokens),
        pad_token_id=read_token_id(config, "pad_token_id", 0),
        variants=(Variant(VARIANT, model, Parity(0, 0.0, 1.0)),),
        prompts=_prompts(settings, stated),
        labels=_checked_labels(read_labels(config), output, folder) if task is Task.CLASSIFICATION else (),
        multi_label=config.get("problem_type") == "multi_label_classification",
        files=entries,
    )
    # When the old scheme was in use, inputs for positions were fed zeros, so the fingerprint of such a graph belongs to
    # other vectors than those of today.
    covered = set(external) <= named and not interface.inputs.position_ids
    return Bundle(folder, manifest, interface, legacy_covers_weights=covered)


def _interface(
    folder: Path, graph: Graph, config: dict[str, Any], task: Task, output: Tensor, stated: Stated
) -> tuple[Interface, str]:
    """Return how to call the graph, and the pooling for the manifest.

    Raises:
        BundleError: the graph's inputs or the modules of the folder are not supported.
        UnstatedError: the role of an input or the pooling is unknown.
    """
    inputs = find_inputs(graph, stated.inputs, read_first_position(config))
    if task is Task.CLASSIFICATION:
        return Interface(inputs, output.name), "none"
    by_tokens = len(output.shape) == 3
    pooling, normalize = _modules(folder)
    pooling = stated.pooling or pooling
    if by_tokens and not pooling:
        raise UnstatedError(
            f"{folder} does not say how the vectors of the tokens ({output.name}) become one of the text",
            f"pooling={'|'.join(POOLINGS)}",
        )
    if stated.normalize:
        normalize = stated.normalize == "yes"
    found = Interface(inputs, output.name, pooling if by_tokens else "", normalize)
    return found, pooling or "in the graph"


def _is_embedder(folder: Path) -> bool:
    return (folder / "modules.json").exists()


def _modules(folder: Path) -> tuple[str, bool]:
    """Return the pooling that the folder states (empty if none), and whether vectors are normalized.

    Raises:
        BundleError: a module is unknown or not in the usual order, the first is no Transformer, or the pooling is not
            supported.
    """
    listed = read_modules(folder)
    modules = dict(listed)
    if other := sorted((kind for kind in modules if kind not in _MODULES), key=_EXPORTED.__contains__):
        remedy = "choose a model without it, or put it into the graph yourself and remove it from modules.json"
        if other[0] in _EXPORTED:
            remedy = "export the model, which puts it into the graph: `emberpc export embedding`"
        raise BundleError(f"{folder / 'modules.json'}: the module {other[0]} is not run by the server; {remedy}")
    if _is_embedder(folder) and (not listed or listed[0][0] != _MODULES[0]):
        raise BundleError(
            f"{folder / 'modules.json'} lists {', '.join(kind for kind, _ in listed) or 'nothing'}; the first module "
            "must be Transformer; get the model again"
        )
    order = [_MODULES.index(kind) for kind, _ in listed]
    if order != sorted(set(order)):
        raise BundleError(
            f"{folder / 'modules.json'} lists {', '.join(kind for kind, _ in listed)}; the server runs "
            f"{', '.join(_MODULES)}, in this order and each once: put them into the graph"
        )
    if "Pooling" not in modules:
        return "", "Normalize" in modules
    config = f"{modules['Pooling']}/config.json"
    _plain(folder, config)
    return read_pooling(folder / config), "Normalize" in modules


def _model_file(folder: Path, stated: str) -> str:
    """Return the path of the ONNX file, relative to the folder.

    Args:
        folder: the foreign folder.
        stated: the model option `file`; empty: `onnx/model.onnx`, else `model.onnx`, else the only ONNX file in the
            folder and in `onnx`.

    Raises:
        BundleError: there is no such file, or it lies outside the folder.
        UnstatedError: there are several ONNX files, and none is called `model.onnx`.
    """
    if stated:
        _plain(folder, stated)
        if not (folder / stated).is_file():
            raise BundleError(f"{folder} has no {stated}, which the model option file names")
        return stated
    found = sorted(str(path.relative_to(folder)) for path in [*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])
    for usual in ("onnx/model.onnx", "model.onnx"):
        if usual in found:
            found = [usual]
    if not found and (folder / ADAPTER_CONFIG).is_file():
        raise BundleError(
            f"{folder} is an adapter ({ADAPTER_CONFIG}, such as LoRA) and no whole model; merge it with its base "
            "model, and export the result"
        )
    if not found:
        raise BundleError(f"{folder} has neither emberpc.json nor an ONNX file; export the model first")
    if len(found) > 1:
        raise UnstatedError(f"{folder} has the ONNX files {', '.join(found)}", f"file={found[0]}")
    _plain(folder, found[0])
    return found[0]


def _plain(folder: Path, name: str) -> None:
    """Raise BundleError if `name` is an absolute path, or leads out of the folder once symbolic links are followed."""
    if Path(name).is_absolute():
        raise BundleError(f"the file {name} is an absolute path; give its path in the folder {folder}")
    if not is_inside(folder, name):
        raise BundleError(f"{folder / name} leads out of the model's folder; copy the files there (cp -rL)")


def _dimensions(config: dict[str, Any], output: Tensor, task: Task, stated: Stated) -> int:
    """Return the dimensions of a text's vector: as stated, else the output's width, else the width in config.json.

    1 for a classifier, which returns no vectors.

    Raises:
        UnstatedError: neither the options, nor the graph, nor config.json states the dimensions.
        BundleError: the dimensions are out of range.
    """
    if task is Task.CLASSIFICATION:
        return 1
    if stated.dimensions:
        return int(stated.dimensions)
    width = output.shape[-1] if output.shape else None
    if isinstance(width, int):
        return whole_number(width, f"the width of the output {output.name}", 1, MAX_DIMENSIONS)
    if (known := read_dimensions(config)) is not None:
        return known
    raise UnstatedError(f"the dimensions of the output {output.name} are not stated", "dimensions=NUMBER")


def _max_tokens(folder: Path, config: dict[str, Any], stated: Stated) -> int:
    found = int(stated.max_tokens) if stated.max_tokens else read_max_tokens(folder, config)
    if found is None:
        raise UnstatedError(f"{folder} does not say how many tokens it takes", "max_tokens=NUMBER")
    return found


def _prompts(settings: dict[str, Any], stated: Stated) -> Prompts:
    own = read_prompts(settings)
    return Prompts(query=stated.query_prompt or own.query, passage=stated.passage_prompt or own.passage)


def _checked_labels(labels: tuple[str, ...], output: Tensor, folder: Path) -> tuple[str, ...]:
    width = output.shape[-1] if output.shape else None
    if width == 1 or (len(labels) == 1 and not isinstance(width, int)):
        raise BundleError(
            f"{folder} gives one score for a text ({output.name}), as rerankers (cross-encoders) and regressions do, "
            "and no labels; serve a classifier of at least two labels"
        )
    if not labels or (isinstance(width, int) and width != len(labels)):
        raise BundleError(
            f"{folder / 'config.json'} names {len(labels)} labels in id2label, and the graph's {output.name} has "
            f"{width}; correct it"
        )
    return labels
