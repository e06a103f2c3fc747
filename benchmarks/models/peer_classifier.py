"""Train the classifier of a peer in an environment of its own, and classify texts.

    python peer_classifier.py PEER ENCODER TRAIN.csv TEST.csv CPU_SECONDS RESULT.json

PEER is `setfit` or `autointent`. The script needs the packages of that peer only. The CSV files have the columns text
and label. RESULT.json gets `labels`, the label of each test text or null; `cpu_seconds` of training and classification;
and `capped`, which says whether the limit of CPU-seconds shortened the training.

SetFit has its own defaults: one epoch of all pairs, 16 pairs in a batch. If the pairs need more than CPU_SECONDS, the
number of steps is the one that fits, by the time of 20 steps, so that the learning rate still decays to 0.

AutoIntent has the preset `classic-light`, the one of its own introduction, with ENCODER in place of its default. It is
trained again on all texts after the search, as its documentation advises. It stops starting trials at CPU_SECONDS.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

#: Share of the CPU-seconds that training may use; the rest is for the head and the test texts.
_TRAINING_SHARE = 0.9
#: Steps that are run to time a step, and pairs in a batch, which is SetFit's default.
_TIMED_STEPS, _BATCH = 20, 16


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process and of its ended children."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def read(path: str) -> tuple[list[str], list[str]]:
    """Return the texts and the labels of a CSV file."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def setfit(
    encoder: str, texts: list[str], labels: list[str], test: list[str], limit: float
) -> tuple[list[str | None], bool]:
    peer, datasets = import_module("setfit"), import_module("datasets")
    names = sorted(set(labels))
    counts = [labels.count(name) for name in names]
    positive = sum(count * (count + 1) // 2 for count in counts)
    negative = len(texts) * (len(texts) + 1) // 2 - positive
    steps = -(-2 * max(positive, negative) // _BATCH)

    def train(max_steps: int) -> Any:
        model = peer.SetFitModel.from_pretrained(encoder, labels=names, local_files_only=True)
        settings = peer.TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=max_steps,
            report_to="none",
            save_strategy="no",
            show_progress_bar=False,
        )
        data = datasets.Dataset.from_dict({"text": texts, "label": [names.index(label) for label in labels]})
        trainer = peer.Trainer(model=model, args=settings, train_dataset=data)
        if max_steps == _TIMED_STEPS:
            trainer.train_embeddings(*trainer.dataset_to_parameters(data), args=settings)
        else:
            trainer.train()
        return model

    train(_TIMED_STEPS)  # loads what is loaded once
    start = cpu_seconds()
    train(_TIMED_STEPS)
    per_step = (cpu_seconds() - start) / _TIMED_STEPS
    fitting = int((_TRAINING_SHARE * limit - cpu_seconds()) / per_step)
    model = train(min(steps, fitting) if fitting < steps else -1)
    return [str(label) for label in model.predict(test)], fitting < steps


def autointent(
    encoder: str, texts: list[str], labels: list[str], test: list[str], limit: float
) -> tuple[list[str | None], bool]:
    peer, configs = import_module("autointent"), import_module("autointent.configs")
    names = sorted(set(labels))
    rows = [{"utterance": text, "label": names.index(label)} for text, label in zip(texts, labels, strict=True)]
    pipeline = peer.Pipeline.from_preset("classic-light", seed=1)
    pipeline.set_config(configs.SentenceTransformerEmbeddingConfig(model_name=encoder))
    pipeline.set_config(configs.HPOConfig(n_trials=20, n_startup_trials=10, timeout=_TRAINING_SHARE * limit))
    pipeline.fit(peer.Dataset.from_dict({"train": rows}), refit_after=True)
    capped = cpu_seconds() > limit
    return [None if found is None else names[int(found)] for found in pipeline.predict(test)], capped


def main() -> None:
    name, encoder, train, test, limit, result = sys.argv[1:]
    texts, labels = read(train)
    found, capped = {"setfit": setfit, "autointent": autointent}[name](
        encoder, texts, labels, read(test)[0], float(limit)
    )
    Path(result).write_text(json.dumps({"labels": found, "cpu_seconds": cpu_seconds(), "capped": capped}))


if __name__ == "__main__":
    main()
