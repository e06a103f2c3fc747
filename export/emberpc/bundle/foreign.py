"""Read a foreign folder, which has no manifest: infer the model's settings from files, graph and model options.

Tools such as sentence-transformers and optimum write foreign folders. A foreign folder must have `tokenizer.json` and
an ONNX file, usually in the folder itself or in `onnx/`. Most foreign folders have `config.json`. Those of embedding
models often have `modules.json`, `1_Pooling/config.json` and `config_sentence_transformers.json`.
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
from emberpc.bundle.reading import TOKENIZER_NAME, Bundle, read_bundle, sha256_of
from emberpc.bundle.tokenizer_settings import check_tokenizer
from emberpc.bundle.transformers_settings import (
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

#: Texts on which the model of a foreign folder is tried, each alone and all in one batch: a text must have nearly the
#: same output in both cases. The lengths differ, so the batch is padded, and a graph that does not mask padding fails.
PROBES = (
    "a kitten asleep on the sofa",
    "Interest rates rose again this spring, and lenders expect another rise before the year is out.",
    "yes",
)
#: Name of the only variant of a foreign folder.
VARIANT = "onnx"
_MODULES = ("Transformer", "Pooling", "Normalize")
#: Modules that the server does not run, but that an export can put into the graph; the error for such a module says so.
#: An export refuses all modules except these and `_MODULES`.
_EXPORTED = ("Dense",)


@dataclass(frozen=True)
class Stated:
    """Model options: settings of a foreign folder's model that the user states, each as a text.

    An empty text means that the setting is not stated; it is inferred from the folder's files then. `pooling` is one of
    `POOLINGS`; with a stated pooling, the model is an embedding model, even if the graph has an output `logits`.
    `output` is the name of an output of the graph. `max_tokens` and `dimensions` are decimal numbers.
    """

    #: The ONNX file, as a path relative to the folder.
    file: str = ""
    #: Roles of the graph's inputs, such as `ROLE=NAME:ROLE=NAME`; `find_inputs` describes all forms.
    inputs: str = ""
    output: str = ""
    pooling: str = ""
    #: `yes` or `no`: whether the server normalizes the vectors, after the pooling if there is one.
    normalize: str = ""
    max_tokens: str = ""
    dimensions: str = ""
    query_prompt: str = ""
    passage_prompt: str = ""

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> Stated:
        """Return model options, given by name, after the checks that need no folder.

        Raises:
            BundleError: an option is unknown, or its value is not allowed or too long. `pooling` and `normalize` may be
                missing, but not empty.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise BundleError(f"there is no model option {unknown[0]!r}; there are: {', '.join(known)}")
        takes = {"pooling": POOLINGS, "normalize": ("yes", "no")}
        for name, values in takes.items():
            if options.get(name, values[0]) not in values:
                raise BundleError(f"the model option {name} is {options[name]!r}; it is one of {', '.join(values)}")
        for name, maximum in (("max_tokens", MAX_TOKENS), ("dimensions", MAX_DIMENSIONS)):
            if options.get(name):
                whole_number(options[name], f"the model option {name}", 1, maximum)
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
    """Read a bundle, or a foreign folder as if it were a bundle. A folder with `emberpc.json` is a bundle.

    Args:
        folder: the folder.
        options: model options of a foreign folder, by the names of the fields of `Stated`; empty for a bundle.
        look: loads an ONNX file and returns its inputs and outputs; it is not called for a bundle. Its errors are
            raised as they are.
        check_hashes: whether to compare the SHA-256 of each file of a bundle with the manifest, and not only its size;
            without effect on a foreign folder.
        contents: reads the tokenizer and the weights of a foreign folder; None: they are read from disk. Not used for a
            bundle.

    Raises:
        BundleError: the folder is missing, or is neither a bundle nor a foreign folder; a file or setting is missing,
            wrong or not supported; or options were given for a bundle or are wrong.
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

    The model is a classifier if the graph has an output `logits`, the folder has no `modules.json`, and no pooling is
    stated. It is a classifier even if another output is stated.

    Args:
        folder: the folder.
        stated: the model options that the user gave.
        look: loads an ONNX file and returns its inputs and outputs. Its errors are raised as they are.
        contents: reads the tokenizer and the files with weights; None: they are read from disk.

    Returns:
        A bundle without reference outputs. The hashes in its manifest are computed from the files as they are now, or
        as `contents` has read them.

    Raises:
        BundleError: a file is missing, lies outside the folder or cannot be read; an option is wrong; or a setting, the
            graph or the tokenizer is wrong or not supported.
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
    # The fingerprint of the old scheme covers only the ONNX file and files with this pattern of names. So these files
    # are hashed, even if the ONNX file does not name them. All other external weight files are hashed, too.
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
        multi_label=task is Task.CLASSIFICATION and config.get("problem_type") == "multi_label_classification",
        files=entries,
    )
    # The old scheme covered no external weight files with other names. When the scheme was in use, inputs for positions
    # were fed zeros, so the old fingerprint of a graph with such an input belongs to other vectors than those of today.
    covered = set(external) <= named and not interface.inputs.position_ids
    return Bundle(folder, manifest, interface, legacy_covers_weights=covered)


def _interface(
    folder: Path, graph: Graph, config: dict[str, Any], task: Task, output: Tensor, stated: Stated
) -> tuple[Interface, str]:
    """Return how to call the graph, and the pooling for the manifest.

    The pooling for the manifest is `none` for a classifier. For an embedding model, it is the stated pooling, else that
    of `modules.json`, else `in the graph`. The interface has a pooling only if the output has a vector for each token.

    Raises:
        BundleError: the graph's inputs, the option `inputs`, config.json or the modules are wrong or not supported.
        UnstatedError: the role of an input is unknown, or the output has a vector for each token and no pooling is
            known.
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
    """Return the pooling that `modules.json` states, and whether `modules.json` lists Normalize.

    The pooling is empty if `modules.json` is missing or lists no Pooling.

    Raises:
        BundleError: `modules.json` lists others than Transformer, Pooling and Normalize in this order, where the last
            two may be missing; the pooling is not supported; or a file is damaged, or that of the pooling missing.
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
        stated: the model option `file`; empty: `onnx/model.onnx`, else `model.onnx`, else the only `*.onnx` of the
            folder and of `onnx` together.

    Raises:
        BundleError: there is no such file, it lies outside the folder, or `stated` is an absolute path.
        UnstatedError: the folder and `onnx` have several `*.onnx`, and none is called `model.onnx`.
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
    """Raise BundleError if the path `name` is absolute, has a NUL, or leads out of the folder, also by links."""
    if Path(name).is_absolute():
        raise BundleError(f"the file {name} is an absolute path; give its path in the folder {folder}")
    if "\0" in name:
        raise BundleError(f"{folder}: the name {name!r} has a NUL character, which no file has; correct it")
    if not is_inside(folder, name):
        raise BundleError(f"{folder / name} leads out of the model's folder; copy the files there (cp -rL)")


def _dimensions(config: dict[str, Any], output: Tensor, task: Task, stated: Stated) -> int:
    """Return the dimensions of a text's vector, or 1 for a classifier, which returns no vectors.

    The dimensions are those of the options, else the fixed size of the output's last axis, else those of config.json.

    Raises:
        UnstatedError: neither the options, nor the graph, nor config.json states the dimensions.
        BundleError: the dimensions are out of range, or are no whole number in config.json.
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
