"""Helpers of the benchmarks: texts, a server with its CPU time and memory, and callers.

Run as a program, this module embeds texts with concurrent calls, and prints `LoadMeasurements` as JSON. `call` runs
this program, so that the CPU time of the callers is not counted as that of the benchmark:

    python -m benchmarks.shared.load ADDRESS TEXTS.json [--in-flight 64] [--batch 1]
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import Message

from emberpc.bundle.cores import usable_cores
from emberpc.export.data.stdlib_texts import read_stdlib
from emberpc.server.engine import Model, Runtimes, Truncation
from emberpc.server.errors import items_of
from emberpc.server.settings import ENGINES, PRECISIONS
from emberpc.v1 import embedding_pb2, embedding_pb2_grpc, types_pb2
from emberpc.wire import vectors
from examples.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]

EMBED = "/emberpc.v1.EmbeddingService/Embed"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class LoadMeasurements:
    """Measurements of concurrent calls.

    Attributes:
        seconds: wall seconds from the start of the first call to the end of the last one.
        latencies: seconds of each successful call, in the order in which the calls ended.
        cpu_seconds: CPU seconds of the callers' process in this time.
        texts: number of texts that were sent, those of failed calls included.
        errors: number of calls that failed.
    """

    seconds: float
    latencies: list[float]
    cpu_seconds: float
    texts: int
    errors: int

    def percentile(self, share: float) -> float:
        """Return a latency in milliseconds that at least the share `share` of the successful calls did not exceed.

        The latency is that of one of the calls, without interpolation. `share` is in [0, 1]. At least one call must
        have succeeded.
        """
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def mixed_texts(count: int, queries: Path | None, seed: int = 0) -> list[str]:
    """Return texts in random order: 70 % short queries, and 30 % passages of 40 to 180 words.

    The short queries are distinct. The passages are successive words of docstrings of Python's standard library; only
    with very many texts, the same words occur in several passages.

    Args:
        count: number of texts.
        queries: CSV file whose column `text` has the short queries. None: they are the first sentences of docstrings
            of the standard library, cut to 200 characters.
        seed: seed of the choice of queries, of the lengths of passages, and of the order.

    Raises:
        ValueError: there are too few distinct short queries.
    """
    generator = random.Random(seed)
    words = [doc.text.split() for doc in read_stdlib()]
    if queries is None:
        short = [" ".join(doc)[:200].partition(". ")[0] for doc in words]
    else:
        with queries.open(newline="", encoding="utf-8") as file:
            short = [row["text"] for row in csv.DictReader(file)]
    short = sorted(set(short))
    flat = [word for doc in words for word in doc]
    long: list[str] = []
    place = 0
    while len(long) < round(0.3 * count):
        length = generator.randint(40, 180)
        long.append(" ".join(flat[place : place + length]))
        place = (place + length) % (len(flat) - 200)
    texts = generator.sample(short, count - len(long)) + long
    generator.shuffle(texts)
    return texts


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options `--engine` and `--precision`, with the values of `emberpc serve` but `auto`."""
    parser.add_argument("--engine", choices=ENGINES[1:], default=ENGINES[1], help="(default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS[1:], default=PRECISIONS[1], help="(default: %(default)s)")


def engine_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the flags of `emberpc serve` for the options of `add_engine_options`."""
    return ["--engine", arguments.engine, "--precision", arguments.precision]


def runtimes_of(arguments: argparse.Namespace) -> Runtimes:
    """Return how the model is run by the options of `add_engine_options`, with one batch at a time on each core."""
    return Runtimes({"": arguments.engine}, {"": arguments.precision}, usable_cores())


@contextmanager
def serving(bundle: Path, *flags: str) -> Iterator[ServerProcess]:
    """Start a server with a bundle under the name `model` and a temporary data directory; yield the server.

    The server is stopped at the end of the block.

    Args:
        bundle: folder of the bundle.
        flags: further flags of `emberpc serve`.

    Raises:
        RuntimeError: the server did not start.
        TimeoutExpired: the server did not end within 300 s at the end of the block.
    """
    with tempfile.TemporaryDirectory() as data, ServerProcess({"model": bundle}, Path(data), *flags) as process:
        yield process


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that all threads of a process have used since its start, without its child processes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_megabytes(pid: int) -> float:
    """Return the resident memory of a process in MB (10^6 bytes)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def call(address: str, texts: Sequence[str], *, in_flight: int, batch: int = 1) -> LoadMeasurements:
    """Embed texts with concurrent calls from a child process; return the measurements.

    Args:
        address: address of a server with one model, as host:port.
        texts: texts to embed, each once; the server truncates long texts at their end.
        in_flight: number of concurrent calls.
        batch: number of texts in a call; the last call may have fewer.

    Raises:
        RuntimeError: a call failed.
        CalledProcessError: the child process failed.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(list(texts), file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.shared.load", address, file.name]
        command += ["--in-flight", str(in_flight), "--batch", str(batch)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
    outcome = LoadMeasurements(**json.loads(run.stdout))
    if outcome.errors:
        raise RuntimeError(f"{outcome.errors} calls failed")
    return outcome


def model_vectors(bundle: Path, texts: Sequence[str]) -> np.ndarray:
    """Return the vectors that a bundle's model gives in this process with ONNX Runtime: float32 (texts, dimensions).

    Each text is a run of its own; long texts are truncated at their end.
    """
    model = Model.load("bare", bundle)
    tokenized = model.tokenizer.tokenize(texts, "", Truncation.END, items_of("texts"))
    return np.concatenate([model.finish(model.encoder.run([text.ids])) for text in tokenized])


def check_responses(address: str, bundle: Path, texts: Sequence[str]) -> float:
    """Compare the server's vectors with those that the bundle's model gives in this process.

    The texts are sent in calls of 1 text, and again in calls of 32 texts.

    Args:
        address: address of a server with one model, as host:port.
        bundle: folder of the model's bundle. The model must return vectors of length 1.
        texts: at least one text; long texts are truncated at their end.

    Returns:
        The minimum cosine of a text's two vectors in the calls of 32 texts.

    Raises:
        RuntimeError: a cosine is below 0.999, in calls of 1 or of 32 texts.
        grpc.RpcError: a call failed.
    """
    expected = model_vectors(bundle, texts)
    with grpc.insecure_channel(address) as channel:
        embed = embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed
        for batch in (1, 32):
            parts = [texts[i : i + batch] for i in range(0, len(texts), batch)]
            requests = [embedding_pb2.EmbedRequest(texts=part, truncation=types_pb2.TRUNCATION_END) for part in parts]
            responses = [each.result() for each in [embed.future(request) for request in requests]]
            got = np.concatenate([vectors.decode(response.embeddings) for response in responses])
            minimum = float(np.einsum("ij,ij->i", got, expected).min())
            if minimum < 0.999:
                raise RuntimeError(f"a vector of the server has a cosine of {minimum:.4f} to the model's own vector")
    return minimum


def capacity(address: str, method: str, requests: Sequence[Message], each: int) -> float:
    """Call a method with concurrent h2load processes, one for each request; return the seconds that all calls took.

    The seconds include start and end of the processes. h2load (of nghttp2) uses far less CPU time than a Python client,
    so it leaves the cores to the server. It does not check responses. For Embed, `check_responses` does.

    Args:
        address: address of the server, as host:port.
        method: path of the method, such as /emberpc.v1.EmbeddingService/Embed.
        requests: the request of each h2load process.
        each: number of times that each process sends its request, one call after the other.

    Raises:
        RuntimeError: not every call got a response with an HTTP status of success. A gRPC error has this HTTP status,
            too, so it is not noticed.
        FileNotFoundError: h2load is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for number, message in enumerate(requests):
            request = message.SerializeToString()
            body = Path(folder) / str(number)
            body.write_bytes(b"\0" + len(request).to_bytes(4, "big") + request)
            headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
            command = ["h2load", "-c1", "-m1", f"-n{each}", "-d", str(body), *headers, f"http://{address}{method}"]
            commands.append(command)
        start = perf_counter()
        callers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        outputs = [caller.communicate()[0] for caller in callers]
        seconds = perf_counter() - start
    if not all(f" {each} succeeded" in output for output in outputs):
        raise RuntimeError("not every call succeeded")
    return seconds


def embed_requests(texts: Sequence[str]) -> list[Message]:
    """Return an Embed request for each text, which asks the server to truncate a long text at its end."""
    return [embedding_pb2.EmbedRequest(texts=[text], truncation=types_pb2.TRUNCATION_END) for text in texts]


async def _call(address: str, texts: Sequence[str], in_flight: int, batch: int) -> LoadMeasurements:
    parts = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    messages = [embedding_pb2.EmbedRequest(texts=part, truncation=types_pb2.TRUNCATION_END) for part in parts]
    requests = iter([message.SerializeToString() for message in messages])
    latencies: list[float] = []
    errors = 0
    async with grpc.aio.insecure_channel(address) as channel:
        # Responses are not decoded, since this would take CPU time from the server. To check the vectors, a benchmark
        # calls `check_responses` first.
        embed: Any = channel.unary_unary(EMBED)
        await channel.channel_ready()

        async def one_after_another() -> None:
            nonlocal errors
            for request in requests:
                start = perf_counter()
                try:
                    await embed(request)
                except grpc.aio.AioRpcError:
                    errors += 1
                else:
                    latencies.append(perf_counter() - start)

        start, cpu = perf_counter(), process_time()
        await asyncio.gather(*(one_after_another() for _ in range(in_flight)))
        return LoadMeasurements(perf_counter() - start, latencies, process_time() - cpu, len(texts), errors)


def host() -> dict[str, str]:
    """Return a description of this host: processor, and versions of Python and packages.

    `cores` is the number of cores in the CPU affinity of this process; unlike `usable_cores`, it ignores quotas.
    """
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    versions = {name: version(name) for name in ("onnxruntime", "grpcio", "tokenizers", "numpy")}
    return {
        "processor": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        **versions,
    }


def middle(values: Sequence[float]) -> float:
    """Return the median of at least one number."""
    return float(median(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    texts = json.loads(arguments.texts.read_text(encoding="utf-8"))
    print(json.dumps(asdict(asyncio.run(_call(arguments.address, texts, arguments.in_flight, arguments.batch)))))


if __name__ == "__main__":
    main()
