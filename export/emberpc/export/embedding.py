"""Export an encoder as a bundle of an embedding model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from emberpc.bundle import Manifest, Prompts, Reference, Task, Variant, finish_bundle, staged_folder
from emberpc.bundle.transformers_settings import read_token_id
from emberpc.export.card import model_card
from emberpc.export.convert import onnx_export
from emberpc.export.convert.graph import GraphEditor
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.convert.parity import compare, require, torch_vectors
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.errors import ExportError
from emberpc.export.names import FP32, check_variants
from emberpc.export.progress import Progress, no_progress
from emberpc.export.retrieval.queries import Judged, read_validation
from emberpc.export.source.encoder import SourceEncoder, read_encoder
from emberpc.export.source.matryoshka import check_matryoshka
from emberpc.export.threads import bounded_threads
from emberpc.export.variants import add_variants

MODEL_PATH = "onnx/model.onnx"
#: Number of texts on which an exported model is compared with PyTorch.
PARITY_TEXTS = 64
#: Number of these texts, from the first, that are stored in the bundle with PyTorch's outputs, for later checks on any
#: host.
REFERENCE_TEXTS = 16
#: Keys that are removed from the bundle's tokenizer_config.json. transformers copies the first four there from the
#: truncation and padding in the source's tokenizer.json, and some readers would truncate or pad by them. The others are
#: options with which the export loaded the tokenizer.
_BAKED_IN = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")
#: Name of the class of a tokenizer without code of its own that transformers 5 writes, and transformers 4 cannot load.
#: Both load the older name, `PreTrainedTokenizerFast`.
_NEW_TOKENIZER_CLASS = "TokenizersBackend"
#: Key of the list of special tokens without a role of their own. In transformers 4, the key has a mapping, and the list
#: is in `additional_special_tokens`, which transformers 5 reads too.
_EXTRA_TOKENS = "extra_special_tokens"
_TOOLS = ("torch", "transformers", "optimum", "onnx", "onnxscript", "onnxruntime", "tokenizers")


def export_embedding(
    source: str | Path,
    target: Path | str,
    *,
    overwrite: bool = False,
    name: str = "",
    max_tokens: int | None = None,
    prompts: Prompts | None = None,
    matryoshka: Sequence[int] | None = None,
    variants: Sequence[str] = (FP32,),
    validation: Path | str | None = None,
    corpus: Path | str | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Export an encoder as a bundle of an embedding model, and check it against PyTorch.

    Args:
        source: an encoder: a folder, the name of an installed package that holds one, or a hub id.
        target: the bundle's folder; the finished bundle is moved there at the end.
        overwrite: whether to replace an existing bundle.
        name: name of the base model in the manifest; default: the source's name.
        max_tokens: maximum number of tokens of a text; default: the source's limit.
        prompts: prompts that the server puts before queries and passages; default: the source's.
        matryoshka: dimensions that vectors may be shortened to; empty: none; default: the source's.
        variants: variants to write in addition to fp32: names, or `auto`; see `emberpc.export.variants`.
        validation: a file to measure variants on: texts like those to be served (column text), or queries with passages
            that answer them (columns query and passage); default: docstrings of Python's standard library. Queries are
            used only if there are variants in addition to fp32.
        corpus: if `validation` has queries, a file of more passages to search in; None: no more passages.
        progress: called with the current step.

    Returns:
        The manifest, with the measured parity.

    Raises:
        ExportError: an argument or a data file is invalid, the source cannot be exported, a variant requested by name
            cannot be made or misses its bound, or outputs differ from PyTorch's.
        BundleError: `target` may not be written or replaced, or a value of the manifest is out of range, such as one of
            `matryoshka`.
        OSError: a file cannot be written, for example since the disk is full.
    """
    check_variants(variants)
    texts_to_try, judged = read_validation(validation, corpus)
    encoder = read_encoder(source, name=name, max_tokens=max_tokens, progress=progress)
    if prompts is not None:
        encoder = replace(encoder, prompts=prompts)
    if matryoshka is not None:
        encoder = replace(encoder, matryoshka_dimensions=tuple(sorted(set(matryoshka), reverse=True)))
    with staged_folder(target, overwrite=overwrite) as folder, bounded_threads():
        manifest = write_embedding(
            encoder, folder, variants=variants, texts_to_try=texts_to_try, judged=judged, progress=progress
        )
        return finish_bundle(folder, manifest)


def write_embedding(
    encoder: SourceEncoder,
    folder: Path,
    *,
    variants: Sequence[str],
    texts_to_try: Sequence[str] = (),
    judged: Judged | None = None,
    strategy: str = "",
    quality: Mapping[str, float] | None = None,
    progress: Progress,
) -> Manifest:
    """Write the files of an embedding model's bundle except the manifest, and check the model against PyTorch.

    Args:
        encoder: the encoder.
        folder: a folder from `staged_folder`.
        variants: variants to write in addition to fp32: names, or `auto`.
        texts_to_try: texts to measure variants on; empty: docstrings of Python's standard library.
        judged: queries and passages to measure variants on instead of texts; ignored if only fp32 is written.
        strategy: name of the method by which the encoder was fine-tuned; empty if it was not.
        quality: figures of the fine-tuning, for the manifest.
        progress: called with the current step.

    Returns:
        The manifest without the list of files. The caller passes it to `finish_bundle`, which adds the list and writes
        the manifest.

    Raises:
        ExportError: the encoder cannot be exported, a variant requested by name cannot be made or misses its bound, or
            outputs differ from PyTorch's.
        BundleError: a value of the manifest is out of range.
        OSError: a file cannot be written, for example since the disk is full.
    """
    converted = convert_encoder(encoder, folder, progress)
    converted.graph.save(folder / MODEL_PATH)
    write_sentence_transformers(encoder, converted.dimensions, folder)
    write_json(folder / "config.json", encoder.config)
    progress("comparing with PyTorch", 0, 1, f"{PARITY_TEXTS} texts")
    texts = sample_texts(PARITY_TEXTS)
    expected = torch_vectors(str(encoder.folder), texts, encoder.max_tokens, stated=encoder.max_tokens_stated)
    runner = OnnxRunner(folder / MODEL_PATH, folder / "tokenizer.json", encoder.max_tokens, converted.pad_token_id)
    parity = compare(expected, runner.run(texts, "sentence_embedding"))
    require(encoder.name, parity, expected)
    Reference(tuple(texts[:REFERENCE_TEXTS]), expected[:REFERENCE_TEXTS]).write(folder)
    manifest = Manifest(
        task=Task.EMBEDDING,
        variants=(Variant("fp32", MODEL_PATH, parity),),
        strategy=strategy,
        quality=dict(quality or {}),
        **common_fields(encoder, converted),
    )
    manifest = add_variants(
        folder,
        manifest,
        variants,
        texts=texts_to_try,
        judged=judged,
        measured_on=_measured_on(texts_to_try, judged),
        progress=progress,
    )
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
    return manifest


def _measured_on(texts: Sequence[str], judged: Judged | None) -> str:
    if judged is not None:
        return "passages, and queries with those that answer them"
    return "the texts of the validation file" if texts else "docstrings of Python's standard library"


@dataclass(frozen=True)
class Converted:
    """An encoder that was converted to ONNX: its graph with pooling, the dimensions of its vectors, and its padding id.

    The graph is in memory only; the tokenizer's files are in the bundle's folder.
    """

    graph: GraphEditor
    dimensions: int
    pad_token_id: int


def convert_encoder(encoder: SourceEncoder, folder: Path, progress: Progress) -> Converted:
    """Convert an encoder to ONNX, add its pooling, and write its tokenizer to the bundle's folder.

    The tokenizer's files state no truncation and no padding. The graph is not written: callers may extend it first.

    Raises:
        ExportError: the encoder cannot be converted, its `max_tokens` leaves no space for a token beside the special
            tokens, or one of its Matryoshka dimensions exceeds the dimensions of its vectors.
        BundleError: `pad_token_id` of the encoder's config.json is out of range.
        OSError: a file cannot be written, for example since the disk is full.
    """
    progress("converting to ONNX", 0, 1)
    with tempfile.TemporaryDirectory(dir=folder) as raw:
        graph = GraphEditor(onnx_export.convert(encoder.transformer, Path(raw), encoder.max_tokens))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(Path(raw) / name, folder / name)
    dimensions = graph.pool(encoder.pooling, encoder.dense, normalize=encoder.normalize)
    check_matryoshka(encoder.matryoshka_dimensions, dimensions, encoder.name)
    # Switch off truncation and padding in tokenizer.json: the server pads each batch, and each call decides whether its
    # texts are truncated.
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if encoder.lower_case:
        # sentence-transformers lower-cases texts outside the tokenizer, but the server uses only the tokenizer. So make
        # the tokenizer lower-case.
        own = tokenizer.get("normalizer")
        before = [{"type": "Lowercase"}, *([own] if own else [])]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": before}
    write_json(folder / "tokenizer.json", {**tokenizer, "truncation": None, "padding": None})
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    minimum = Tokenizer.from_file(str(folder / "tokenizer.json")).num_special_tokens_to_add(is_pair=False) + 1
    if encoder.max_tokens < minimum:
        raise ExportError(
            f"max_tokens is {encoder.max_tokens}; {encoder.name} needs at least {minimum} for a text of one token"
        )
    for key in _BAKED_IN:
        tokenizer_config.pop(key, None)
    if tokenizer_config.get("tokenizer_class") == _NEW_TOKENIZER_CLASS:
        tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := tokenizer_config.get(_EXTRA_TOKENS), list):
        del tokenizer_config[_EXTRA_TOKENS]
        tokenizer_config["additional_special_tokens"] = extra
    write_json(folder / "tokenizer_config.json", {**tokenizer_config, "model_max_length": encoder.max_tokens})
    return Converted(graph, dimensions, read_token_id(encoder.config, "pad_token_id", 0))


def common_fields(encoder: SourceEncoder, converted: Converted) -> dict[str, Any]:
    """Return the fields that manifests of embedding models and of classifiers share, as arguments of `Manifest`.

    They describe the encoder, the versions of the tools and, in `created`, the time of this call.
    """
    return {
        "base_model": encoder.name,
        "revision": encoder.revision,
        "weights_sha256": encoder.weights_sha256,
        "dimensions": converted.dimensions,
        "pooling": encoder.pooling,
        "normalize": encoder.normalize,
        "max_tokens": encoder.max_tokens,
        "max_tokens_stated": encoder.max_tokens_stated,
        "pad_token_id": converted.pad_token_id,
        "prompts": encoder.prompts,
        "matryoshka_dimensions": encoder.matryoshka_dimensions,
        "tools": {name: version(name) for name in _TOOLS},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_sentence_transformers(encoder: SourceEncoder, dimensions: int, folder: Path) -> None:
    """Write the configuration files with which sentence-transformers, TEI and others load an embedding model's bundle.

    The caller writes config.json. The folders of the encoder's dense layers are copied to the bundle.

    Args:
        encoder: the encoder; its folder must still exist if it has dense layers.
        dimensions: dimensions of the model's vectors.
        folder: the bundle's folder.
    """
    dense = ["Dense" for _ in encoder.dense]
    kinds = ["Transformer", "Pooling", *dense, *(["Normalize"] if encoder.normalize else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if kind == "Transformer" else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    pooling = {
        "word_embedding_dimension": len(encoder.dense[0].weights) if encoder.dense else dimensions,
        "pooling_mode_cls_token": encoder.pooling == "cls",
        "pooling_mode_mean_tokens": encoder.pooling == "mean",
        "pooling_mode_max_tokens": encoder.pooling == "max",
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_lasttoken": encoder.pooling == "lasttoken",
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    for i, layer in enumerate(encoder.dense, 2):
        shutil.copytree(encoder.folder / layer.path, folder / f"{i}_Dense")
    if encoder.normalize:
        (folder / f"{len(kinds) - 1}_Normalize").mkdir()
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_tokens, "do_lower_case": False})
    prompts = {kind: text for kind, text in vars(encoder.prompts).items() if text}
    write_json(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})


def write_json(path: Path, data: object) -> None:
    """Write data to a file as indented JSON in UTF-8; create missing parent folders, and replace an existing file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
