"""Compare the CPU time of ONNX files of one model, such as those of two converters, in turn and on one thread.

Each file runs with each engine, and with ONNX Runtime also with all of its fusions (those of `SLOW_FUSIONS` too). The
batches are of several shapes; in a batch, all texts but the first are padded from the middle on. Each figure is the
median of the rounds, and the ratio to the first file with ONNX Runtime as the server loads it.

    taskset -c 0 python -m benchmarks.models.graphs FILE FILE … [--rounds 31] [--output sentence_embedding]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from emberpc.server.engine.sessions.onnx_runtime import OnnxSession
from emberpc.server.engine.sessions.openvino import OpenVinoSession
from emberpc.server.engine.sessions.session import SessionError

#: Numbers of texts and tokens of the batches: single texts, and micro-batches of 128 to 512 tokens.
SHAPES = ((1, 8), (1, 40), (8, 16), (4, 64), (16, 32), (2, 180), (1, 512))

Feeds = dict[str, npt.NDArray[np.int64]]
Run = Callable[[Feeds], object]


def all_fusions(path: Path, output: str) -> tuple[list[str], Run]:
    """Load a file with all fusions of ONNX Runtime; return its inputs' names, and a function that runs a batch."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [each.name for each in session.get_inputs()], lambda feeds: session.run([output], feeds)


def runs(path: Path, output: str) -> dict[str, tuple[list[str], Run]]:
    """Load a file with each engine of this host; return the inputs' names, and a function that runs a batch."""
    found = {"onnxruntime, all fusions": all_fusions(path, output)}
    loaded: dict[str, OnnxSession | OpenVinoSession] = {"onnxruntime": OnnxSession(path, 1)}
    for precision in ("fp32", "bf16"):
        try:
            loaded[f"openvino {precision}"] = OpenVinoSession(path, precision)
        except SessionError as error:
            print(f"{path.name}, openvino {precision}: {error}")
    for name, session in loaded.items():
        inputs = [each.name for each in session.graph.inputs]
        found[name] = (inputs, lambda feeds, session=session: session.run(feeds, output))  # type: ignore[misc]
    return found


def batch(texts: int, tokens: int, rng: np.random.Generator) -> Feeds:
    """Return random token ids, which occur in all vocabularies of 30,000 tokens."""
    mask = np.ones((texts, tokens), dtype=np.int64)
    mask[1:, tokens // 2 :] = 0
    ids = rng.integers(1000, 20_000, (texts, tokens))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", default="sentence_embedding")
    given = parser.parse_args()
    cases = {
        (str(path), name): case for path in given.files for name, case in runs(path.resolve(), given.output).items()
    }
    first = (str(given.files[0]), "onnxruntime")
    ratios: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    rng = np.random.default_rng(0)
    for texts, tokens in SHAPES:
        feeds = batch(texts, tokens, rng)
        times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
        for number in range(given.rounds + 2):
            # The order is turned in every second round, since the case before decides what is in the caches.
            for case in list(cases)[:: 1 if number % 2 else -1]:
                inputs, run = cases[case]
                own = {name: feeds[name] for name in inputs}
                start = process_time()
                run(own)
                if number >= 2:  # the first rounds compile kernels
                    times[case].append(process_time() - start)
        base = float(np.median(times[first]))
        for case, taken in times.items():
            ratios[case].append(float(np.median(taken)) / base)
    table = Table("file", "engine", *(f"{texts}x{tokens}" for texts, tokens in SHAPES), "geometric mean")
    for (path, name), found in ratios.items():
        mean = float(np.exp(np.mean(np.log(found))))
        table.add_row(path, name, *(f"{ratio:.3f}" for ratio in found), f"{mean:.3f}")
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
