"""The commands about bundles: export embedding, export classifier, verify."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from emberpc.bundle import BundleError, Manifest, Prompts, Task
from emberpc.cli.errors import EXPORT_PACKAGES, VERIFY_PACKAGES, CliError, ExitCode, require
from emberpc.cli.options import AsJson, Overwrite, listed
from emberpc.cli.output import Column, note, plain, print_fields, print_gap, print_json, print_table
from emberpc.cli.progress import Stages, stages

app = typer.Typer(help="Make bundles from PyTorch models, offline.", no_args_is_help=True)

Target = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The bundle's folder.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of a text; default: what the source says.", show_default=False)
]

Checkpoints = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where a training keeps what it needs to be resumed.")
]

#: Of data with labels, for `compare` too.
Descriptions = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What labels mean: columns label, description; default: their names."),
]
LabelTexts = Annotated[
    bool, typer.Option(help="Learn from the labels' descriptions or names, too, if they tell texts apart.")
]
LabelSeparator = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="A text may have several labels, with this between them.", show_default=False),
]
Balanced = Annotated[bool, typer.Option("--balanced", help="Every label counts alike, however rare.")]
MinExamples = Annotated[int, typer.Option(min=1, help="Fewest texts that a label must have.")]
TextColumn = Annotated[str, typer.Option(help="The column with the texts.")]
LabelColumn = Annotated[str, typer.Option(help="The column with the labels.")]
Train = Annotated[Path, typer.Option(metavar="FILE", help="CSV, TSV, JSONL or Parquet with texts and labels.")]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME,…",
        help="What to write beside fp32: optimized, int8, int8-fast, fp16, several with commas or given several times; "
        "or auto: those that are faster or smaller and near enough to fp32.",
        show_default=False,
    ),
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
    matryoshka: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="DIMENSIONS",
            help="Vectors may be cut to these; may be repeated; default: what the source says.",
            show_default=False,
        ),
    ] = None,
    variants: Variants = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measure variants on these: texts like those to be served, in a column `text`; or queries and what "
            "answers them, in columns `query` and `passage`. Default: docstrings.",
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With queries: more passages to search among; text, perhaps title."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export an encoder as an embedding model, and check it against PyTorch."""
    prompts = None
    if query_prompt is not None or passage_prompt is not None:
        prompts = Prompts(query=query_prompt or "", passage=passage_prompt or "")
    with exporting() as progress:
        from emberpc.export.embedding import export_embedding

        manifest = export_embedding(
            source,
            output,
            overwrite=overwrite,
            name=name,
            max_tokens=max_tokens,
            prompts=prompts,
            matryoshka=matryoshka,
            variants=variant_names(variants),
            validation=validation,
            corpus=corpus,
            progress=progress,
        )
    show_bundle(manifest, output, as_json)


@app.command()
def classifier(
    train: Train,
    base: Annotated[str, typer.Option(metavar="SOURCE", help="The encoder; as for `export embedding`.")],
    output: Target,
    strategy: Annotated[
        str,
        typer.Option(
            help="zero-shot, centroids or linear leave the encoder as it is; top-layers, contrastive and full tune it."
        ),
    ] = "linear",
    validation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file like --train, to stop early by and to calibrate on; default: some of --train."
        ),
    ] = None,
    out_of_scope: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts that have none of the labels: says from where on to reject."),
    ] = None,
    rejection_rate: Annotated[
        float, typer.Option(help="Without --out-of-scope: the share of texts with labels that may be rejected.")
    ] = 0.01,
    descriptions: Descriptions = None,
    label_texts: LabelTexts = True,
    label_separator: LabelSeparator = None,
    balanced: Balanced = False,
    min_examples: MinExamples = 2,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the texts; default: by their number.", show_default=False)
    ] = None,
    checkpoints: Checkpoints = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    variants: Variants = None,
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option(help="Of splits and order.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a classifier, calibrate it, export it, and check it against PyTorch."""
    with exporting() as progress:
        from emberpc.export.classifier import ClassifierData, export_classifier

        data = ClassifierData(
            train=train,
            validation=validation,
            outside=out_of_scope,
            descriptions=descriptions,
            text_column=text_column,
            label_column=label_column,
            separator=label_separator,
            min_examples=min_examples,
        )
        manifest = export_classifier(
            data,
            base,
            output,
            strategy=strategy,
            label_texts=label_texts,
            balanced=balanced,
            epochs=epochs,
            rejection_rate=rejection_rate,
            checkpoints=checkpoints,
            variants=variant_names(variants),
            overwrite=overwrite,
            max_tokens=max_tokens,
            seed=seed,
            progress=progress,
        )
    show_bundle(manifest, output, as_json)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle, or another folder with an ONNX file.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="The PyTorch model to run beside it; as for `export embedding`."),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTION=VALUE", help="What a model that emberpc did not export leaves unsaid; as for `serve`."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a model is whole and gives what PyTorch gave; the exit code is 7 if not."""
    if not folder.is_dir():
        raise CliError(f"{folder} is no folder; give that of a bundle")
    require(VERIFY_PACKAGES, "server", "emberpc verify")
    if against is not None:
        require(EXPORT_PACKAGES, "export", "emberpc verify --against")
    options = dict(_option(text) for text in model_option or ())
    from emberpc.export.verify import verify_bundle

    report = verify_bundle(folder, options=options, against=against)
    if as_json:
        print_json([{"ok": report.ok, **plain(report)}])
    else:
        rows = [("ok" if check.ok else "FAILED", check.name, check.detail) for check in report.checks]
        print_table([Column("result"), Column("check"), Column("detail")], rows)
    if not report.ok:
        raise CliError(f"{folder} failed the verification; do not serve it", ExitCode.UNVERIFIED)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise CliError(f"--model-option is {text!r}; it must be OPTION=VALUE, such as pooling=mean")
    return name, value


@contextmanager
def exporting(command: str = "emberpc export", left: str = "nothing was written") -> Iterator[Stages]:
    """Show the progress of a command of the export room, and turn its errors into ours.

    Args:
        command: what to call it.
        left: what there is after a full disk.
    """
    require(EXPORT_PACKAGES, "export", command)
    from emberpc.export.errors import ExportError

    try:
        with stages() as progress:
            progress("loading PyTorch", 0, 1)  # what the block imports first takes seconds
            yield progress
    except ExportError as error:
        raise CliError(str(error)) from error
    except BundleError as error:
        raise CliError(str(error), ExitCode.CONFLICT) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CliError(f"{where}{error.strerror}; {left}; is there room on the disk?") from error


def show_bundle(manifest: Manifest, folder: Path, as_json: bool) -> None:
    """Print what a bundle that was just made is worth."""
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
            "strategy": manifest.strategy,
            **{name: f"{value:.4g}" for name, value in manifest.quality.items()},
        }
    )
    print_gap()
    _show_variants(manifest)
    name = folder.resolve().name
    ask = f"emberpc classify TEXT --classifier {name}" if manifest.labels else f"emberpc embed TEXT --model {name}"
    note(f"next: `emberpc serve --model {shlex.quote(f'{name}={folder}')}`, and in another terminal `{ask}`")


def _show_variants(manifest: Manifest) -> None:
    """Print what each variant is worth, then what was tried and not kept."""
    classifier = manifest.task is Task.CLASSIFICATION
    agreement = "same label" if classifier else "same 10 nearest"
    first = manifest.variant().measured
    titles = ["least cosine to PyTorch", "mean cosine to fp32", agreement, *(["accuracy"] if classifier else [])]
    titles += ["nDCG@10"] if first is not None and first.ndcg_at_10 is not None else []
    titles += ["texts per CPU-s", "times fp32", "MB", "load s"]
    rows = []
    for variant in manifest.variants:
        found = variant.measured
        if found is None:
            continue
        share = found.label_agreement if classifier else found.neighbour_agreement
        cells = [variant.name, f"{variant.parity.cosine_min:.6f}", f"{found.cosine_mean:.4f}", f"{share:.3f}"]
        cells += [f"{figure:.4f}" for figure in (found.accuracy, found.ndcg_at_10) if figure is not None]
        cells += [f"{found.texts_per_cpu_second:.1f}", f"{found.speedup:.2f}", f"{found.size_bytes / 1e6:.1f}"]
        rows.append([*cells, f"{found.load_seconds:.2f}"])
    print_table([Column("variant"), *(Column(title, "right") for title in titles)], rows)
    if len(rows) > 1:
        note(f"variants were measured on {manifest.measured_on}")
    for name, reason in manifest.dropped.items():
        note(f"{name} was not kept: {reason}")


def variant_names(values: list[str] | None) -> list[str]:
    """Read the values of --variants."""
    return listed("--variants", values or ["fp32"])
