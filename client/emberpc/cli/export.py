"""The commands `emberpc export embedding`, `emberpc export classifier` and `emberpc verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from emberpc.bundle import BundleError, Prompts, check_target
from emberpc.cli.bundle_summary import show_bundle
from emberpc.cli.errors import EXPORT_PACKAGES, VERIFY_PACKAGES, CliError, ExitCode, require
from emberpc.cli.options import AsJson, Overwrite, completer, listed
from emberpc.cli.output import Column, plain, print_json, print_table
from emberpc.cli.progress import Stages, stages
from emberpc.export.data.classifier_data import ClassifierData
from emberpc.export.names import AUTO, CANDIDATE_NAMES, FP32, ExportableStrategy, check_rates, check_variants

app = typer.Typer(help="Export PyTorch models to bundles, offline.", no_args_is_help=True)

Target = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the bundle.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Maximum number of tokens of a text; default: the limit of the source.", show_default=False
    ),
]

Checkpoints = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder for checkpoints, from which an interrupted training resumes.")
]

#: Encoder of the commands that train, if --base is not given.
DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
Base = Annotated[str, typer.Option("--base", metavar="SOURCE", help="The encoder; as for `export embedding`.")]
#: From here to `Train`: options for labelled data, of `export classifier` and of `compare`.
Descriptions = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Descriptions of labels, in columns label and description; default: the label names."
    ),
]
LabelTexts = Annotated[
    bool,
    typer.Option(help="Also learn from the descriptions or names of the labels, if they help to separate the texts."),
]
LabelSeparator = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Separator of labels: a text may have several labels.", show_default=False),
]
Balanced = Annotated[bool, typer.Option("--balanced", help="Give every label the same weight, however rare it is.")]
MinExamples = Annotated[int, typer.Option(min=1, help="Minimum number of texts of a label.")]
TextColumn = Annotated[str, typer.Option(help="The column with the texts.")]
LabelColumn = Annotated[str, typer.Option(help="The column with the labels.")]
Train = Annotated[Path, typer.Option(metavar="FILE", help="CSV, TSV, JSONL or Parquet with texts and labels.")]
#: Columns of a file of descriptions, and of a corpus, with remedies for `check_columns`.
DESCRIPTION_COLUMNS = {"label": "add the column", "description": "add the column"}
CORPUS_COLUMNS = {"text": "add the column"}
Variants = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME,…",
        autocompletion=completer((AUTO, FP32, *CANDIDATE_NAMES)),
        help="Variants beside fp32: int8, int8-fast, int8-static or fp16, separated by commas or given "
        "several times; or auto: those that are faster or smaller than fp32 and accurate enough.",
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
    name: Annotated[str, typer.Option(help="Name of the base model; default: the name of the source.")] = "",
    query_prompt: Annotated[
        str | None, typer.Option(help="Prompt that is put before queries.", show_default=False)
    ] = None,
    passage_prompt: Annotated[
        str | None, typer.Option(help="Prompt that is put before passages.", show_default=False)
    ] = None,
    matryoshka: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="DIMENSIONS",
            help="Dimensions to which vectors may be shortened; may be repeated; default: those of the source.",
            show_default=False,
        ),
    ] = None,
    variants: Variants = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts to measure variants on, like those to be served, in a column `text`; or queries and their "
            "passages, in columns `query` and `passage`. Default: docstrings.",
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With queries: more passages to search, in a column `text` and optionally `title`."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export an encoder as an embedding model, and check its vectors against those of PyTorch."""
    prompts = None
    if query_prompt is not None or passage_prompt is not None:
        prompts = Prompts(query=query_prompt or "", passage=passage_prompt or "")

    def check() -> None:
        from emberpc.export.retrieval.queries import read_validation

        check_variants(names)
        read_validation(validation, corpus)

    names, files = variant_names(variants), {validation: {}, corpus: CORPUS_COLUMNS}
    with exporting(files, [source], output, check, max_tokens=max_tokens, overwrite=overwrite) as progress:
        from emberpc.export.embedding import export_embedding

        manifest = export_embedding(
            source,
            output,
            overwrite=overwrite,
            name=name,
            max_tokens=max_tokens,
            prompts=prompts,
            matryoshka=matryoshka,
            variants=names,
            validation=validation,
            corpus=corpus,
            progress=progress,
        )
    show_bundle(manifest, output, as_json)


@app.command()
def classifier(
    train: Train,
    output: Target,
    base: Base = DEFAULT_BASE,
    strategy: Annotated[
        ExportableStrategy,
        typer.Option(
            help="zero-shot, centroids and linear do not change the encoder; top-layers, contrastive and full tune it."
        ),
    ] = "linear",
    validation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file like --train, for early stopping and calibration; default: a part of --train."
        ),
    ] = None,
    out_of_scope: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts that have none of the labels, to choose what is rejected."),
    ] = None,
    rejection_rate: Annotated[
        float, typer.Option(help="Without --out-of-scope: the share of texts with labels that may be rejected.")
    ] = 0.01,
    max_false_rejections: Annotated[
        float,
        typer.Option(help="With --out-of-scope: the greatest share of texts with labels that may be rejected."),
    ] = 0.05,
    descriptions: Descriptions = None,
    label_texts: LabelTexts = True,
    label_separator: LabelSeparator = None,
    balanced: Balanced = False,
    min_examples: MinExamples = 2,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the texts; default: chosen by the number of texts.", show_default=False),
    ] = None,
    checkpoints: Checkpoints = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    variants: Variants = None,
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option(help="Random seed of splits and order.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a classifier, calibrate it if there are enough texts, export it, and check its outputs against PyTorch."""
    labelled = labelled_columns(text_column, label_column, label_separator)
    files = {
        train: labelled,
        validation: labelled,
        out_of_scope: text_columns(text_column),
        descriptions: DESCRIPTION_COLUMNS,
    }
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
    names = variant_names(variants)

    def check() -> None:
        check_rates(rejection_rate, max_false_rejections)
        check_variants(names)
        if strategy == "zero-shot" and not label_texts:
            raise CliError("the strategy zero-shot needs the texts of the labels; leave out --no-label-texts")
        data.read(with_descriptions=label_texts)

    with exporting(files, [base], output, check, max_tokens=max_tokens, overwrite=overwrite) as progress:
        from emberpc.export.classifier import export_classifier

        manifest = export_classifier(
            data,
            base,
            output,
            strategy=strategy,
            label_texts=label_texts,
            balanced=balanced,
            epochs=epochs,
            rejection_rate=rejection_rate,
            max_false_rejections=max_false_rejections,
            checkpoints=checkpoints,
            variants=names,
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
        typer.Option(metavar="SOURCE", help="PyTorch model to compare with; a source as for `export embedding`."),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION=VALUE", help="Setting of a model that emberpc did not export, as for `serve`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a bundle is undamaged, and its outputs against those of PyTorch. Exit code 7: a check failed.

    For another folder with an ONNX file: check that a text has the same output
    alone and in a batch.
    """
    if not folder.is_dir():
        found = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise CliError(f"{found}; give the folder of a bundle")
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


def labelled_columns(text_column: str, label_column: str, separator: str | None) -> dict[str, str]:
    """Return the columns that the first row of a file of labelled texts must have: those of the text and the label.

    The values are the remedies for `check_columns`.

    `separator` is the separator of the labels of a text; None: each text has one label. With a separator, a text may
    have no label, so only the column of the text must be there.
    """
    label = {label_column: "name the column of the labels with --label-column"} if separator is None else {}
    return {**text_columns(text_column), **label}


def text_columns(text_column: str) -> dict[str, str]:
    """Return the column that the first row of a file of texts must have, with the remedy for `check_columns`."""
    return {text_column: "name the column of the texts with --text-column"}


@contextmanager
def exporting(
    files: Mapping[Path | None, Mapping[str, str]],
    encoders: Sequence[str],
    target: Path | None,
    check: Callable[[], object],
    *,
    max_tokens: int | None = None,
    overwrite: bool = False,
    command: str = "emberpc export",
    left: str = "nothing was written",
) -> Iterator[Stages]:
    """Context manager of an export: check its inputs and folder, show its progress, and convert errors of its block.

    Args:
        files: the data files, and the columns that the first row of each must have, with remedies as for
            `check_columns`; an entry with the key None is ignored. The files are checked before the block begins, since
            the block loads PyTorch, which takes seconds.
        encoders: sources of the encoders; those on this host are checked last before the block.
        target: folder of the bundle; None: no bundle is written.
        check: further checks to do before the block. The function may raise the exceptions that the block may raise.
        max_tokens: maximum number of tokens of a text; None: the limit of each encoder.
        overwrite: whether to replace an existing bundle.
        command: name of the command, for messages.
        left: what the export left on the disk, for the message of an OSError.

    Yields:
        The function to call with the progress.

    Raises:
        CliError: a package is missing, a data file is wrong, or the block raised ExportError or OSError; exit code 2.
            Or `target` may not be written, or the block raised BundleError; exit code 5.
    """
    require(EXPORT_PACKAGES, "export", command)
    from emberpc.export.data.datasets import check_columns
    from emberpc.export.errors import ExportError
    from emberpc.export.source.encoder import check_encoder

    try:
        if target is not None:
            check_target(target, overwrite=overwrite)
        for path, columns in files.items():
            if path is not None:
                check_columns(path, columns)
        check()
        for encoder in encoders:
            check_encoder(encoder, max_tokens)
        with stages() as progress:
            progress("loading PyTorch", 0, 1)  # the imports of the block take seconds
            yield progress
    except ExportError as error:
        raise CliError(str(error)) from error
    except BundleError as error:
        raise CliError(str(error), ExitCode.CONFLICT) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CliError(f"{where}{error.strerror}; {left}; is there free space on the disk?") from error


def variant_names(values: list[str] | None) -> list[str]:
    """Return the variants that the values of --variants name, separated by commas; `fp32` if there are no values.

    Unknown names are returned too: the export refuses them.

    Raises:
        CliError: a name is empty or repeated.
    """
    return listed("--variants", values or [FP32])
