"""The command `emberpc export finetune-embedding`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emberpc.cli.bundle_summary import show_bundle
from emberpc.cli.export import (
    CORPUS_COLUMNS,
    DEFAULT_BASE,
    Base,
    Checkpoints,
    MaxTokens,
    Target,
    Variants,
    app,
    exporting,
    variant_names,
)
from emberpc.cli.options import AsJson, Overwrite
from emberpc.cli.output import note
from emberpc.export.names import check_variants
from emberpc.export.retrieval.queries import Files, RetrievalData, read_data


@app.command("finetune-embedding")
def finetune_embedding(
    train: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="CSV, TSV, JSONL or Parquet with columns query, passage and optionally negative; or text, label.",
        ),
    ],
    output: Target,
    base: Base = DEFAULT_BASE,
    validation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file like --train, to choose the best epoch on; default: some queries of --train."
        ),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file like --train, to measure on before and after; it does not affect the training."
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="More passages to search, also for hard negatives, in a column `text` and optionally `title`.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Maximum number of passes over the queries.")] = 3,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of upper layers to tune; default: a third of the layers.", show_default=False),
    ] = None,
    hard_negatives: Annotated[
        int,
        typer.Option(
            min=0, help="Hard negatives for each query of a batch: similar passages that do not answer the query."
        ),
    ] = 1,
    checkpoints: Checkpoints = None,
    variants: Variants = None,
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option(help="Random seed of split, order and samples.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune an embedding model for search. Without a gain on held-out queries: no export, exit code 2."""
    files: dict[Path | None, dict[str, str]] = {train: {}, validation: {}, test: {}, corpus: CORPUS_COLUMNS}
    names, paths = variant_names(variants), Files(train, validation, test, corpus)
    data: RetrievalData | None = None

    def check() -> None:
        nonlocal data
        check_variants(names)
        data = read_data(paths, seed)

    with exporting(files, [base], output, check, max_tokens=max_tokens, overwrite=overwrite) as progress:
        from emberpc.export.finetune import finetune_embedding as finetune

        manifest = finetune(
            data or paths,
            base,
            output,
            epochs=epochs,
            layers=layers,
            hard_negatives=hard_negatives,
            checkpoints=checkpoints,
            variants=names,
            overwrite=overwrite,
            max_tokens=max_tokens,
            seed=seed,
            progress=progress,
        )
    show_bundle(manifest, output, as_json)
    quality = manifest.quality
    if test is not None and quality["test_ndcg_at_10_after"] <= quality["test_ndcg_at_10_before"]:
        note("warning: the model improved on the held-out queries, but not on those of --test; do not rely on it")
