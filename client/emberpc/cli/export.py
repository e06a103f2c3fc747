"""The commands about bundles: export embedding, export classifier, verify."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from emberpc.bundle import BundleError, Manifest, Prompts
from emberpc.cli.errors import EXPORT_PACKAGES, VERIFY_PACKAGES, CliError, ExitCode, require
from emberpc.cli.options import AsJson
from emberpc.cli.output import Column, Stages, plain, print_fields, print_json, print_table, stages

app = typer.Typer(help="Make bundles from PyTorch models, offline.", no_args_is_help=True)

Target = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The bundle's folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of a text; default: what the source says.", show_default=False)
]


@app.command()
def embedding(
    source: Annotated[
        str, typer.Argument(help="A folder, an installed package that holds one, or a Hugging Face hub id.")
    ],
    output: Target,
    overwrite: Overwrite = False,
    max_tokens: MaxTokens = None,
    name: Annotated[str, typer.Option(help="What to call the base model; default: as the source is called.")] = "",
    query_prompt: Annotated[str | None, typer.Option(help="Goes before queries.", show_default=False)] = None,
    passage_prompt: Annotated[str | None, typer.Option(help="Goes before passages.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Export an encoder as an embedding model, and check it against PyTorch."""
    prompts = None
    if query_prompt is not None or passage_prompt is not None:
        prompts = Prompts(query=query_prompt or "", passage=passage_prompt or "")
    with _exporting() as progress:
        from emberpc.export.embedding import export_embedding

        manifest = export_embedding(
            source,
            output,
            overwrite=overwrite,
            name=name,
            max_tokens=max_tokens,
            prompts=prompts,
            progress=progress,
        )
    _show(manifest, output, as_json)


@app.command()
def classifier(
    train: Annotated[Path, typer.Option(metavar="FILE", help="CSV, TSV, JSONL or Parquet with texts and labels.")],
    base: Annotated[str, typer.Option(metavar="SOURCE", help="The encoder; as for `export embedding`.")],
    output: Target,
    validation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file like --train, only to measure on; default: a fifth of --train."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column with the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="The column with the labels.")] = "label",
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a classifier, export it, and check it against PyTorch."""
    with _exporting() as progress:
        from emberpc.export.classifier import export_classifier

        manifest = export_classifier(
            train,
            base,
            output,
            validation=validation,
            text_column=text_column,
            label_column=label_column,
            overwrite=overwrite,
            max_tokens=max_tokens,
            seed=seed,
            progress=progress,
        )
    _show(manifest, output, as_json)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle.")],
    as_json: AsJson = False,
) -> None:
    """Check that a bundle is whole and gives what PyTorch gave; the exit code is 7 if not."""
    if not folder.is_dir():
        raise CliError(f"{folder} is no folder; give that of a bundle")
    require(VERIFY_PACKAGES, "server", "emberpc verify")
    from emberpc.export.verify import verify_bundle

    report = verify_bundle(folder)
    if as_json:
        print_json([{"ok": report.ok, **plain(report)}])
    else:
        rows = [("ok" if check.ok else "FAILED", check.name, check.detail) for check in report.checks]
        print_table([Column("result"), Column("check"), Column("detail")], rows)
    if not report.ok:
        raise CliError(f"{folder} failed the verification; do not serve it", ExitCode.UNVERIFIED)


@contextmanager
def _exporting() -> Iterator[Stages]:
    """Show the progress of an export, and turn its errors into ours."""
    require(EXPORT_PACKAGES, "export", "emberpc export")
    from emberpc.export.errors import ExportError

    try:
        with stages() as progress:
            yield progress
    except ExportError as error:
        raise CliError(str(error)) from error
    except BundleError as error:
        raise CliError(str(error), ExitCode.CONFLICT) from error


def _show(manifest: Manifest, folder: Path, as_json: bool) -> None:
    if as_json:
        print_json([manifest])
        return
    print_fields(
        {
            "folder": folder,
            "task": manifest.task.value,
            "base model": manifest.base_model,
            "dimensions": manifest.dimensions,
            "max tokens": manifest.max_tokens,
            "labels": manifest.labels,
            **{
                f"variant {variant.name}": f"cosine to PyTorch at least {variant.parity.cosine_min:.6f}"
                for variant in manifest.variants
            },
            **{name: f"{value:.4g}" for name, value in manifest.quality.items()},
        }
    )
