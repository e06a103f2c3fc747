"""The commands `emberpc embed`, `count-tokens`, `similarity` and `classify`, which work on texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from emberpc.cli.connection import with_client
from emberpc.cli.error_messages import in_cli_terms
from emberpc.cli.errors import CliError, ExitCode, exit_code
from emberpc.cli.input_files import LineFile
from emberpc.cli.npy_file import RowFile, save
from emberpc.cli.options import DEFAULT_BATCH, AsJson, BatchSize, Overwrite, WithDetails
from emberpc.cli.output import Column, details_printer, note, print_json, print_table, to_terminal
from emberpc.cli.output_files import check_output_path
from emberpc.cli.progress import progress
from emberpc.client import Client
from emberpc.client.classification import Classification
from emberpc.client.details import Details, ResponseDetails, TokenUsage
from emberpc.client.types import DType, InputKind, Matrix, Priority, Progress, StreamedEmbedding, Truncation

Texts = Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="The texts.")]
TextFile = Annotated[str | None, typer.Option("--file", metavar="FILE", help="One text a line; - is stdin.")]
ModelName = Annotated[str, typer.Option(help="The model; needed if several are served.")]
Kind = Annotated[
    InputKind, typer.Option(help="Whether the texts are passages or queries; selects the prompt of the model.")
]
Cut = Annotated[
    Truncation,
    typer.Option(help="Treatment of texts with too many tokens: refuse them, or truncate at the end or the start."),
]

Urgency = Annotated[
    Priority | None,
    typer.Option(
        help="Urgency of the texts: the server may run interactive texts before bulk texts. Default: interactive for "
        "arguments, bulk for --file.",
        show_default=False,
    ),
]

#: Maximum count of numbers of a vector that a table on a terminal shows.
_PREVIEW = 6
#: Default of --top-k for a table on a terminal.
_TOP_K = 3
#: Shown in a table instead of the label of a rejected text.
_REJECTED = "(rejected)"
#: Maximum number of lines that `embed --stream` has read and that are not answered yet. The limit is twice --batch-size
#: if that is more, so that the server has a request to work on while the next one is read.
_WINDOW = 1024


@with_client
def embed(
    client: Client,
    texts: Texts = None,
    file: TextFile = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the vectors to this .npy file.")
    ] = None,
    model: ModelName = "",
    input_kind: Kind = "passage",
    dimensions: Annotated[int, typer.Option(min=0, help="Number of leading dimensions to keep; 0: all.")] = 0,
    truncation: Cut = "refuse",
    dtype: Annotated[
        DType,
        typer.Option(
            help="Element type in which the server sends the vectors. The output is float32. A type other than float32 "
            "saves bytes on the wire and loses precision; binary keeps only signs, as -1 and 1."
        ),
    ] = "float32",
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Whether to scale the vectors to length 1. Default: as the model states in `normalized`.",
            show_default=False,
        ),
    ] = None,
    priority: Urgency = None,
    batch_size: BatchSize = DEFAULT_BATCH,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="For a file of any size, in little memory, with -o or --json. An invalid line fails alone; its row is "
            "NaN. JSON objects come in any order, each with its line number. --details prints a line for each text.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    with_details: WithDetails = False,
    as_json: AsJson = False,
) -> None:
    """Embed texts, and print their vectors or write them to a .npy file, a row for each text."""
    if output:
        check_output_path(output, overwrite, takes_streams=False)
    if stream:
        if texts or not file or bool(output) == as_json:
            raise CliError("--stream goes with --file and one of -o and --json")
        results = client.embed_stream(
            (source := LineFile(file)).numbered(),
            model=model,
            input_kind=input_kind,
            dimensions=dimensions,
            truncation=truncation,
            dtype=dtype,
            normalize=normalize,
            priority=priority or "bulk",
            batch_size=batch_size,
            window=max(_WINDOW, 2 * batch_size),
        )
        _write_stream(source, results, output, details_printer(with_details))
        return
    with _given(texts, file) as listed, _shown("embedding", listed, file) as done:
        matrix = client.embed(
            listed,
            model=model,
            input_kind=input_kind,
            dimensions=dimensions,
            truncation=truncation,
            dtype=dtype,
            normalize=normalize,
            priority=priority or ("bulk" if file else "interactive"),
            batch_size=batch_size,
            progress=done,
            details=details_printer(with_details),
        )
    if output:
        save(matrix, output)
        note(f"wrote {matrix.shape[0]} × {matrix.shape[1]} float32 to {output}")
    elif as_json:
        print_json({"text": text, "vector": row} for text, row in zip(listed, matrix, strict=True))
    else:
        rows = [(text, _vector(row)) for text, row in zip(listed, matrix, strict=True)]
        print_table([Column("text", wide=True), Column("vector")], rows)


@with_client
def count_tokens(
    client: Client,
    texts: Texts = None,
    file: TextFile = None,
    model: ModelName = "",
    input_kind: Kind = "passage",
    with_details: WithDetails = False,
    as_json: AsJson = False,
) -> None:
    """Count the tokens of texts, prompt and special tokens included."""
    with _given(texts, file) as listed:
        counts = client.count_tokens(listed, model=model, input_kind=input_kind, details=details_printer(with_details))
    if as_json:
        print_json({"text": text, "tokens": count} for text, count in zip(listed, counts, strict=True))
    else:
        rows = list(zip(counts, listed, strict=True))
        print_table([Column("tokens", "right"), Column("text", wide=True)], rows)


@with_client
def similarity(
    client: Client,
    source: Annotated[str, typer.Argument(help="A text.")],
    targets: Annotated[list[str], typer.Argument(metavar="TARGET", help="Texts to compare it with.")],
    model: ModelName = "",
    source_kind: Annotated[
        InputKind, typer.Option(help="Whether the first text is a passage or a query; selects the prompt of the model.")
    ] = "passage",
    target_kind: Annotated[
        InputKind,
        typer.Option(help="Whether the other texts are passages or queries; selects the prompt of the model."),
    ] = "passage",
    truncation: Cut = "refuse",
    with_details: WithDetails = False,
    as_json: AsJson = False,
) -> None:
    """Compute the cosine similarity of a text to other texts, from -1 to 1."""
    matrix = client.similarity(
        [source],
        targets,
        model=model,
        source_kind=source_kind,
        target_kind=target_kind,
        truncation=truncation,
        details=details_printer(with_details),
    )
    scores = matrix[0].tolist()
    if as_json:
        print_json({"target": target, "score": score} for target, score in zip(targets, scores, strict=True))
    else:
        rows = [(f"{score:.4f}", target) for target, score in zip(targets, scores, strict=True)]
        print_table([Column("score", "right"), Column("target", wide=True)], rows)


@with_client
def classify(
    client: Client,
    texts: Texts = None,
    file: TextFile = None,
    classifier: Annotated[
        str, typer.Option("--classifier", "--model", help="The classifier; needed if there are several.")
    ] = "",
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            "-k",
            min=0,
            help=f"Maximum number of labels for each text; 0: all. Default: all; {_TOP_K} in a table on a terminal.",
            show_default=False,
        ),
    ] = None,
    truncation: Cut = "refuse",
    priority: Urgency = None,
    batch_size: BatchSize = DEFAULT_BATCH,
    with_details: WithDetails = False,
    as_json: AsJson = False,
) -> None:
    """Classify texts: print their labels and probabilities."""
    if top_k is None:
        top_k = _TOP_K if to_terminal() and not as_json else 0
    with _given(texts, file) as listed, _shown("classifying", listed, file) as done:
        found = client.classify(
            listed,
            classifier,
            top_k=top_k,
            truncation=truncation,
            priority=priority or ("bulk" if file else "interactive"),
            batch_size=batch_size,
            progress=done,
            details=details_printer(with_details),
        )
    if as_json:
        print_json({"text": text, "classification": item} for text, item in zip(listed, found, strict=True))
    else:
        scored = with_details and any(item.rejection_score is not None for item in found)
        columns = [
            Column("label"),
            Column("probabilities"),
            *([Column("rejection score", "right")] if scored else []),
            Column("text", wide=True),
        ]
        rows = [
            (_label(item), _scores(item), *([_rejection_score(item)] if scored else []), text)
            for text, item in zip(listed, found, strict=True)
        ]
        print_table(columns, rows)
        if to_terminal() and any(item.rejected for item in found):
            note(f"{_REJECTED}: no label fits; the probabilities only state which label is the least unlikely")


@contextmanager
def _given(texts: list[str] | None, file: str | None) -> Iterator[list[str]]:
    """Context manager that yields the texts: those of the arguments, or the lines of the file.

    Args:
        texts: texts that were given as arguments; None or empty: none.
        file: value of --file; `-` for stdin; None: not given.

    Raises:
        CliError: there are neither arguments nor a file, or both; an error of `LineFile.texts`; or, with a file, the
            block raised InvalidArgument, InputError or InputTypeError. In the last case, the message names a text by
            its line. With arguments, errors of the block are not converted.
    """
    if bool(texts) == bool(file):
        raise CliError("give texts as arguments, or a file of them with --file; one of the two")
    if texts:
        yield texts
        return
    source = LineFile(str(file))
    listed = source.texts()
    with source.locating("texts"):
        yield listed


def _shown(what: str, texts: list[str], file: str | None) -> AbstractContextManager[Progress | None]:
    """Return a context manager that shows the progress of the work on `texts` as a bar; `what` names the work.

    It yields the function to call with the number of texts done so far. Without a `file` it shows nothing and yields
    None, since the arguments of a command are only a few texts.
    """
    return progress(what, len(texts)) if file else nullcontext()


def _write_stream(
    source: LineFile, results: Iterator[StreamedEmbedding], output: Path | None, details: Details | None
) -> None:
    """Write the vectors of a file's lines as they arrive, in any order.

    A line that is refused has no vector. It is noted on stderr, and the other lines are written. The file `output`
    appears at the end, if a line has a vector and no error ends the stream; otherwise an existing file stays unchanged.

    Args:
        source: the lines.
        results: results of `Client.embed_stream`; the id of each is the number of its line, from 1.
        output: the .npy file to write, with a row for each line; NaN for a line without a vector. None: JSON Lines on
            stdout, with the keys `line` and `vector`.
        details: called with the details of each line that has a vector: model and tokens; None: no calls.

    Raises:
        CliError: a line has no vector; raised at the end, after the other lines are written. Or there are no lines, a
            line cannot be read or is not UTF-8, or the output cannot be written.
        EmberpcError: the stream as a whole failed.
    """
    total = failed = 0
    code = ExitCode.OK
    with ExitStack() as stack:
        array = stack.enter_context(RowFile(output)) if output else None
        # With JSON on stdout, there is no bar: the lines of JSON show the progress.
        done = stack.enter_context(progress("embedding", source.count())) if output else None
        for total, result in enumerate(results, 1):
            line = int(result.id)
            if result.error is not None:
                note(f"{source.name}:{line}: {in_cli_terms(str(result.error))}")
                failed += 1
                code = code or exit_code(result.error) or ExitCode.INTERNAL
                if array:
                    array.leave_out(line - 1)
            elif array and result.vector is not None:
                array.write(line - 1, result.vector)
            else:
                print_json([{"line": line, "vector": result.vector}])
            if details and result.error is None:
                usage = TokenUsage(result.tokens, result.truncated)
                details(ResponseDetails(line - 1, 1, model=result.model, usages=(usage,)))
            if done:
                done(total)
    if not total:
        raise CliError(f"{source.name} is empty; give it one text a line")
    if array and array.dimensions:
        note(f"wrote {array.rows} × {array.dimensions} float32 to {output}")
    if failed:
        raise CliError(f"{failed} of {total} lines have no vector; see above", code)


def _rejection_score(item: Classification) -> str:
    return "" if item.rejection_score is None else f"{item.rejection_score:.4f}"


def _label(item: Classification) -> str:
    return _REJECTED if item.rejected else ", ".join(item.labels) or "(none)"


def _scores(item: Classification) -> str:
    # A score is a float32 on the wire, but a double here, which would be printed with about twice as many digits.
    shown = (f"{score.score:.2f}" if to_terminal() else str(np.float32(score.score)) for score in item.scores)
    return ", ".join(f"{score.label} {number}" for score, number in zip(item.scores, shown, strict=True))


def _vector(row: Matrix) -> str:
    """Return a vector, float32 (dimensions,), as a cell of a table.

    On a terminal: at most 6 first numbers, rounded, and how many there are. Elsewhere: all numbers with all digits.
    """
    if to_terminal():
        return " ".join(f"{value:+.4f}" for value in row[:_PREVIEW]) + f" … {len(row)} in all"
    return " ".join(map(str, row))
