"""Compare the server's throughput with that of its model without a server.

In every round, the same texts go through the same ONNX file without and with a server:

- without a server in ideal micro-batches, the roofline. The texts are tokenized before the measurement and sorted by
  length. A micro-batch has at most 512 tokens, padding included, or is one longer text. One thread for each usable core
  runs the model, with the server's settings of a session.
- through the server over gRPC: with 64 concurrent calls of one text, and with 4 concurrent calls of 32 texts.

70 % of the texts are short queries, 30 % are passages of 40 to 180 words. If h2load is installed (Debian:
nghttp2-client) and there are at least 64 texts, h2load also sends 64 of the texts to the server, and the roofline is
measured with these texts, too. Each of the 64 texts is run `--texts` // 64 times in a round. h2load leaves CPU time to
the server that a Python client takes. The script prints medians over the rounds: of the figures, and of the server's
figures divided by those of the roofline. The targets are printed, and not checked.

    python -m benchmarks.server.roofline BUNDLE [--queries FILE.csv] [--texts 1000] [--rounds 5] [--engine openvino]
        [--precision bf16] [-o RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from shutil import which
from subprocess import run
from tempfile import NamedTemporaryFile
from time import perf_counter, process_time

from benchmarks.shared.load import (
    EMBED,
    add_engine_options,
    call,
    capacity,
    check_responses,
    cpu_seconds,
    embed_requests,
    engine_flags,
    host,
    middle,
    mixed_texts,
    runtimes_of,
    serving,
)
from emberpc.bundle.cores import usable_cores
from emberpc.server.engine import Model, Runtimes, Truncation
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.errors import items_of
from emberpc.server.memory import keep_freed_memory

BATCH_TOKENS = 512
WAYS = {"64 × 1": (64, 1), "4 × 32": (4, 32)}
#: Number of concurrent h2load processes. Each sends another text, the same one in all its calls.
CALLERS = 64
#: Name, in the output, of the runs of the server with h2load.
CAPACITY = f"{CALLERS} × 1, h2load"
#: Name, in the output, of the runs of the roofline with the texts of h2load.
FEW = f"bare, {CALLERS} texts"
#: Targets of the server's figures divided by the roofline's: at least this throughput, at most this CPU time.
TARGETS = {"texts_per_second": 0.92, "cpu_seconds_per_text": 1.08}


def bare(bundle: Path, texts: Sequence[str], runtimes: Runtimes) -> dict[str, float]:
    """Run the bundle's model on texts in ideal micro-batches, with one thread for each usable core, without a server.

    Returns:
        `texts_per_second` and `cpu_seconds_per_text` of this process, both without tokenization.
    """
    keep_freed_memory()
    model = Model.load("bare", bundle, runtimes=runtimes)
    tokenized = model.tokenizer.tokenize(texts, "", Truncation.END, items_of("texts"))
    ids = sorted((text.ids for text in tokenized), key=len)
    queue: SimpleQueue[list[TokenIds]] = SimpleQueue()
    batch: list[TokenIds] = []
    for text in ids:
        if batch and len(text) * (len(batch) + 1) > BATCH_TOKENS:
            queue.put(batch)
            batch = []
        batch.append(text)
    queue.put(batch)

    def work() -> None:
        while True:
            try:
                model.encoder.run(queue.get_nowait())
            except Empty:
                return

    threads = [threading.Thread(target=work) for _ in range(usable_cores())]
    start, cpu = perf_counter(), process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, cpu = perf_counter() - start, process_time() - cpu
    return {"texts_per_second": len(texts) / seconds, "cpu_seconds_per_text": cpu / len(texts)}


def in_a_process(bundle: Path, texts: Sequence[str], flags: Sequence[str]) -> dict[str, float]:
    """Run `bare` in a child process, and return its figures.

    Args:
        bundle: folder of the bundle.
        texts: the texts.
        flags: engine and precision, as `engine_flags` returns them.

    Raises:
        CalledProcessError: the child process failed.
    """
    with NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(list(texts), file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.server.roofline", str(bundle), "--bare", file.name, *flags]
        found: dict[str, float] = json.loads(run(command, check=True, capture_output=True, text=True).stdout)
        return found


def measure(
    bundle: Path, texts: Sequence[str], rounds: int, engine: Sequence[str], flags: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {"bare": [], **{way: [] for way in WAYS}}
    each = len(texts) // CALLERS if which("h2load") else 0
    if each:
        found |= {FEW: [], CAPACITY: []}
    with serving(bundle, "--cache-bytes", "0", *engine, *flags) as server:
        check_responses(server.address, bundle, texts[:100])
        call(server.address, texts[:200], in_flight=64)  # warm
        for number in range(rounds):
            found["bare"].append(in_a_process(bundle, texts, engine))
            for way, (in_flight, batch) in WAYS.items():
                before = cpu_seconds(server.process.pid)
                outcome = call(server.address, texts, in_flight=in_flight, batch=batch)
                used = cpu_seconds(server.process.pid) - before
                found[way].append(
                    {
                        "texts_per_second": len(texts) / outcome.seconds,
                        "cpu_seconds_per_text": used / len(texts),
                        "client_cpu_seconds_per_text": outcome.cpu_seconds / len(texts),
                        "p50_ms": outcome.percentile(0.5),
                        "p99_ms": outcome.percentile(0.99),
                    }
                )
            if each:
                found[FEW].append(in_a_process(bundle, [*texts[:CALLERS]] * each, engine))
                before = cpu_seconds(server.process.pid)
                seconds, count = capacity(server.address, EMBED, embed_requests(texts[:CALLERS]), each), CALLERS * each
                used = cpu_seconds(server.process.pid) - before
                found[CAPACITY].append({"texts_per_second": count / seconds, "cpu_seconds_per_text": used / count})
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an embedding model, exported")
    parser.add_argument("--queries", type=Path, help="CSV with a column text; default: sentences from docstrings")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    add_engine_options(parser)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.bare:
        texts = json.loads(arguments.bare.read_text(encoding="utf-8"))
        print(json.dumps(bare(arguments.bundle, texts, runtimes_of(arguments))))
        return
    texts = mixed_texts(arguments.texts, arguments.queries)
    found = measure(arguments.bundle, texts, arguments.rounds, engine_flags(arguments), flags)
    ratios = {}
    for way, rounds in found.items():
        names = rounds[0].keys()
        print(way, *(f"{name} {middle([one[name] for one in rounds]):.4g}" for name in names), sep="  ")
        if way.startswith("bare"):
            continue
        bases = found[FEW if way == CAPACITY else "bare"]
        for name, target in TARGETS.items():
            pairs = zip(rounds, bases, strict=True)
            ratios[f"{way} {name}"] = middle([one[name] / base[name] for one, base in pairs])
            print(f"    {name}: {ratios[f'{way} {name}']:.3f} of the roofline (target: {target})")
    if arguments.output:
        arguments.output.write_text(json.dumps({"host": host(), "rounds": found, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
