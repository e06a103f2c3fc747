"""Fine-tune an embedding model on queries and their passages, and export it if its retrieval improved."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from emberpc.bundle import Manifest, finish_bundle, staged_folder
from emberpc.export.embedding import write_embedding
from emberpc.export.errors import ExportError
from emberpc.export.names import FP32, check_variants
from emberpc.export.progress import Progress, no_progress
from emberpc.export.retrieval.metrics import DECIDING
from emberpc.export.retrieval.queries import Files, Judged, RetrievalData, read_data
from emberpc.export.retrieval.ranking import TrainingOptions, tune
from emberpc.export.source.encoder import read_encoder
from emberpc.export.threads import bounded_threads
from emberpc.export.timing import Cost
from emberpc.export.tuning.checkpoint import Checkpoints

#: Value of the manifest's field `strategy` for a fine-tuned embedding model: the name of its loss.
STRATEGY = "multiple-negatives-ranking"


@bounded_threads()
def finetune_embedding(
    files: Files | RetrievalData,
    base: str | Path,
    target: Path | str,
    *,
    epochs: int = 3,
    layers: int | None = None,
    hard_negatives: int = 1,
    checkpoints: Path | None = None,
    variants: Sequence[str] = (FP32,),
    overwrite: bool = False,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Manifest:
    """Fine-tune an embedding model for retrieval, export it, and check it against PyTorch.

    Args:
        files: paths of the data files, or their data as `read_data` returns it.
        base: the encoder: a folder, an installed package that holds one, or a hub id.
        target: the bundle's folder; the finished bundle is moved there at the end.
        epochs: maximum number of passes over the queries. The weights of the epoch that is best on the held-out queries
            are kept, or a weighted mean of these and the original weights.
        layers: number of upper layers to train; a number above that of all layers means all. Default: a third of all
            layers, rounded down, at least 1.
        hard_negatives: maximum number of hard negatives for each query of a batch, stated in the data or mined; 0:
            none.
        checkpoints: folder for checkpoints, from which an interrupted training continues; they are removed once the
            bundle is written or the training turned out not to help. None: no checkpoints.
        variants: variants to write in addition to fp32: names, or `auto`; they are measured on the held-out queries.
        overwrite: whether to replace an existing bundle.
        max_tokens: maximum number of tokens of a text; the training truncates longer texts. Default: the base's limit.
        seed: seed of the split into training and held-out queries, of the order of batches, and of the draws of
            passages.
        progress: called with the current step.

    Returns:
        The manifest. Its `quality` has the figures before and after the training that
        `emberpc.export.retrieval.ranking.tune` describes, the numbers of queries and passages, and the training's time.

    Raises:
        ExportError: an argument is invalid, data or base cannot be used, a checkpoint cannot be written, nDCG@10 of the
            held-out queries did not grow, a variant requested by name cannot be made or misses its bound, or outputs
            differ from PyTorch's. No bundle is written then.
        BundleError: `target` may not be written or replaced, or a value of the manifest is out of range.
        OSError: a file cannot be written, for example since the disk is full.
    """
    for name, value, minimum in (("epochs", epochs, 1), ("layers", layers, 1), ("hard_negatives", hard_negatives, 0)):
        if value is not None and value < minimum:
            raise ExportError(f"{name} is {value}; it must be at least {minimum}")
    check_variants(variants)
    data = files if isinstance(files, RetrievalData) else read_data(files, seed)
    encoder = read_encoder(base, max_tokens=max_tokens, progress=progress)
    kept = Checkpoints(checkpoints)
    options = TrainingOptions(seed, epochs, layers, hard_negatives, checkpoints=kept, progress=progress)
    with staged_folder(target, overwrite=overwrite) as folder:
        with Cost() as cost:
            outcome = tune(data, encoder, options)
        quality = {
            "train_queries": float(len(data.train)),
            "held_out_queries": float(len(data.held_out)),
            **({"test_queries": float(len(data.test))} if data.test else {}),
            "passages": float(len(data.passages)),
            "fit_seconds": kept.spent.seconds + cost.seconds,
            "fit_cpu_seconds": kept.spent.cpu_seconds + cost.cpu_seconds,
            **outcome.figures,
        }
        if fault := _no_gain(quality):
            kept.remove()  # the training is finished and its result is not needed
            raise ExportError(fault)
        with tempfile.TemporaryDirectory(dir=folder) as raw:
            outcome.save(Path(raw))
            tuned = replace(
                read_encoder(raw, name=encoder.name, max_tokens=encoder.max_tokens),
                revision=encoder.revision,
                prompts=encoder.prompts,
            )
            manifest = write_embedding(
                tuned,
                folder,
                variants=variants,
                judged=Judged(data.passages, data.held_out),
                strategy=STRATEGY,
                quality=quality,
                progress=progress,
            )
        # Call this only after the block above has removed `raw`, the tuned encoder's folder: every file in `folder`
        # becomes part of the bundle.
        manifest = finish_bundle(folder, manifest)
    kept.remove()
    return manifest


def _no_gain(quality: dict[str, float]) -> str:
    """Return an error message if the training did not raise nDCG@10 of the held-out queries; empty if it did.

    `quality` has the figures of `tune` and the number of held-out queries.
    """
    before, after = (quality[f"held_out_{DECIDING}_{when}"] for when in ("before", "after"))
    if after > before:
        return ""
    tried = "; no epoch improved it" if not quality["share"] else f", after {after:.4f}"
    return (
        f"fine-tuning did not help: nDCG@10 of {quality['held_out_queries']:.0f} held-out queries was {before:.4f} "
        f"before{tried}; nothing was written; give more data, or export the model as it is with "
        "`emberpc export embedding`"
    )
