"""Measure whether the server's memory stays constant under load.

8 concurrent callers embed distinct texts for some minutes. The shortest texts have about 12 tokens; texts above the
bundle's limit are truncated (export the bundle with `emberpc export embedding --max-tokens 512` for long texts). A call
has 1, 8 or 32 texts. One of the callers uses streams. The script reads the server's resident memory about every second.
Target: memory grows by at most 2 % after the first two minutes, from the median of the third minute to the median of
the last one. In a run of at most two minutes, the first minute takes the place of the third. The target is not checked.
To try another allocator, set it in the environment, for example
LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libjemalloc.so.2.

    python -m benchmarks.server.soak BUNDLE [--minutes 30] [--engine openvino] [--precision bf16] [-o RESULT.json]
        [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import json
import random
import threading
from pathlib import Path
from time import perf_counter, sleep

import matplotlib as mpl

from benchmarks.shared.load import (
    add_engine_options,
    cpu_seconds,
    engine_flags,
    host,
    middle,
    resident_megabytes,
    serving,
)
from emberpc.bundle import read_bundle
from emberpc.client import Client
from emberpc.export.data.stdlib_texts import read_stdlib

mpl.use("Agg")
from matplotlib import pyplot

CALLERS = 8
WARM_SECONDS = 120


def caller(address: str, seed: int, stop: threading.Event, done: list[int]) -> None:
    """Embed texts of random lengths until `stop` is set; count the embedded texts in `done[seed]`.

    Texts of a stream that get an error do not count. Any other error is raised, and ends the caller's thread.

    Args:
        address: address of the server, as host:port.
        seed: number of the caller, and seed of its random texts; caller 0 uses streams.
        stop: set when the caller must stop.
        done: number of embedded texts of each caller, changed in place.
    """
    generator = random.Random(seed)
    words = [word for doc in read_stdlib()[:3000] for word in doc.text.split()]
    with Client(address, timeout=120) as client:
        while not stop.is_set():
            count = generator.choice((1, 1, 1, 8, 32))
            texts = []
            for _ in range(count):
                # Number of words, 1 to 362, uniform on a logarithmic scale: texts of 1 word are as frequent as texts of
                # 128 to 255 words. The random number before the words, of some ten tokens, makes each text distinct.
                length = int(2 ** generator.uniform(0, 8.5))
                start = generator.randrange(len(words) - length)
                texts.append(" ".join([str(generator.random()), *words[start : start + length]]))
            if seed == 0:
                done[seed] += sum(each.error is None for each in client.embed_stream(texts, truncation="end"))
            else:
                done[seed] += len(client.embed(texts, truncation="end"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an embedding model, exported")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG file for a plot")
    add_engine_options(parser)
    arguments, flags = parser.parse_known_args()
    stop, done = threading.Event(), [0] * CALLERS
    samples: list[tuple[float, float]] = []
    with serving(arguments.bundle, *engine_flags(arguments), *flags) as server:
        idle = resident_megabytes(server.process.pid)
        threads = [threading.Thread(target=caller, args=(server.address, i, stop, done)) for i in range(CALLERS)]
        for thread in threads:
            thread.start()
        begin, cpu = perf_counter(), cpu_seconds(server.process.pid)
        while (now := perf_counter() - begin) < 60 * arguments.minutes:
            samples.append((now, resident_megabytes(server.process.pid)))
            sleep(1)
        stop.set()
        for thread in threads:
            thread.join()
        cpu = (cpu_seconds(server.process.pid) - cpu) / sum(done)
    after = [(at, memory) for at, memory in samples if at > WARM_SECONDS] or samples
    first = middle([memory for at, memory in after if at <= after[0][0] + 60])
    last = middle([memory for at, memory in after if at >= after[-1][0] - 60])
    growth = last / first - 1
    megabytes = f"idle {idle:.0f} MB, minute 3 {first:.0f} MB, last minute {last:.0f} MB"
    print(f"{sum(done)} texts at {1000 * cpu:.1f} CPU-ms; {megabytes}: {growth:+.1%}")
    if arguments.output:
        result = {
            "host": host(),
            "texts": sum(done),
            "cpu_seconds_per_text": cpu,
            "idle": idle,
            "growth": growth,
            "megabytes": samples,
            "max_tokens": read_bundle(arguments.bundle).manifest.max_tokens,
        }
        arguments.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if arguments.plot:
        figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
        axes.plot([at / 60 for at, _ in samples], [memory for _, memory in samples])
        axes.set(xlabel="minutes", ylabel="resident memory, MB", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(arguments.plot, dpi=120)


if __name__ == "__main__":
    main()
