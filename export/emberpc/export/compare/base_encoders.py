"""Open the encoders of a comparison, and write ONNX files as they would be served."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

from emberpc.bundle import Head
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.embedding import MODEL_PATH, Converted, convert_encoder
from emberpc.export.progress import Progress
from emberpc.export.source.encoder import SourceEncoder, read_encoder
from emberpc.export.timing import Cost


@dataclass(frozen=True)
class Base:
    """An encoder that is open for a comparison.

    `folder` has its ONNX file and tokenizer, and `converted` describes them. `runner` runs the ONNX file, and
    `cached_encoder` caches the results. `seconds` is the wall time that opening took.
    """

    encoder: SourceEncoder
    folder: Path
    converted: Converted
    runner: OnnxRunner
    cached_encoder: CachedEncoder
    seconds: float


def open_base(source: str, folder: Path, max_tokens: int | None, progress: Progress) -> Base:
    """Read an encoder, convert it to ONNX, and open it.

    Args:
        source: the encoder: a folder, an installed package that holds one, or a hub id.
        folder: folder to create, for the ONNX file and the tokenizer; it must not exist.
        max_tokens: maximum number of tokens of a text; longer texts are truncated. None: the limit that the source
            states.
        progress: called with the current step.

    Raises:
        ExportError: the encoder cannot be read or converted.
    """
    with Cost() as cost:
        encoder = read_encoder(source, max_tokens=max_tokens, progress=progress)
        folder.mkdir(parents=True)
        converted = convert_encoder(encoder, folder, progress)
        converted.graph.save(folder / MODEL_PATH)
        runner = _runner(folder, folder, encoder, converted)
    return Base(encoder, folder, converted, runner, CachedEncoder(encoder, runner, progress), cost.seconds)


def export_head(base: Base, head: Head, folder: Path) -> tuple[OnnxRunner, int]:
    """Write the ONNX file of the base's encoder with a linear head, and open it.

    The encoder keeps its original weights. The file of a tuned encoder has the same operators and the same size.

    Args:
        base: the base.
        head: the head.
        folder: existing, empty folder to write to.

    Returns:
        A runner of the ONNX file, and the bytes of the files that serving needs: the ONNX file with its weights, and
        the tokenizer's files.
    """
    graph = copy.deepcopy(base.converted.graph)
    for path in base.folder.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    # Only the logits are compared. Temperature and `multi_label` do not change them, so any values do.
    graph.classify(head.weights, head.bias, 1.0, multi_label=False)
    graph.save(folder / MODEL_PATH)
    return _runner(folder, base.folder, base.encoder, base.converted), size_of(folder)


def _runner(folder: Path, tokenizer: Path, encoder: SourceEncoder, converted: Converted) -> OnnxRunner:
    return OnnxRunner(folder / MODEL_PATH, tokenizer / "tokenizer.json", encoder.max_tokens, converted.pad_token_id)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder and its subfolders."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
