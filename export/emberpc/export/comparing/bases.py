"""The encoders of a comparison, made ready."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

from emberpc.export.classifier import tuned_encoder
from emberpc.export.embedding import MODEL_PATH, Converted, convert_encoder
from emberpc.export.encoder import Encoder, read_encoder
from emberpc.export.progress import Progress
from emberpc.export.runner import Runner
from emberpc.export.strategies import Fitted
from emberpc.export.workbench import Cost, Workbench


@dataclass(frozen=True)
class Base:
    """An encoder, its ONNX file in a folder, what strategies work with, and the seconds that making it took."""

    encoder: Encoder
    folder: Path
    converted: Converted
    runner: Runner
    workbench: Workbench
    seconds: float


def open_base(source: str, folder: Path, max_tokens: int | None, progress: Progress) -> Base:
    """Convert an encoder.

    Args:
        source: as for `read_encoder`.
        folder: where to.
        max_tokens: the most tokens of a text; default: what the source says.
        progress: told how far it is.

    Raises:
        ExportError: it cannot be read or converted.
    """
    with Cost() as cost:
        encoder = read_encoder(source, max_tokens=max_tokens, progress=progress)
        folder.mkdir(parents=True)
        converted = convert_encoder(encoder, folder, progress)
        converted.graph.save(folder / MODEL_PATH)
        runner = _runner(folder, folder, encoder, converted)
    return Base(encoder, folder, converted, runner, Workbench(encoder, runner, progress), cost.seconds)


def export_fitted(base: Base, fitted: Fitted, folder: Path, progress: Progress) -> tuple[Runner, int]:
    """Make the ONNX file that would be served; without a linear head that is the base's own.

    Args:
        base: the base.
        fitted: what a strategy made of it.
        folder: where to; it is there and empty.
        progress: told what is done.

    Returns:
        What runs it, and the bytes of what is served: the ONNX file with its weights, and the tokenizer's files.
    """
    if fitted.head is None:
        return base.runner, _size(base.folder)
    with tuned_encoder(base.encoder, fitted, folder) as (_, tuned):
        untuned = base.converted.graph
        graph = copy.deepcopy(untuned) if tuned is None else convert_encoder(tuned, folder, progress).graph
    if tuned is None:
        for path in base.folder.glob("*.json"):
            shutil.copyfile(path, folder / path.name)
    graph.classify(fitted.head.weights, fitted.head.bias, 1.0, multi_label=False)  # neither changes the logits
    graph.save(folder / MODEL_PATH)
    return _runner(folder, base.folder, base.encoder, base.converted), _size(folder)


def _runner(folder: Path, tokenizer: Path, encoder: Encoder, converted: Converted) -> Runner:
    return Runner(folder / MODEL_PATH, tokenizer / "tokenizer.json", encoder.max_tokens, converted.pad_token_id)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
