"""Run or write models with the ONNX backends of sentence-transformers and optimum, in an environment with optimum-onnx.

`test_optimum.py` starts this script with the Python of `.venv-optimum`:

    optimum_backend.py encode FOLDER TEXTS OUT [FILE]    vectors of texts, by sentence-transformers
    optimum_backend.py encode-queries FOLDER TEXTS OUT   the same with the prompt of queries
    optimum_backend.py classify FOLDER TEXTS OUT         logits of texts, by optimum
    optimum_backend.py write SOURCE TARGET LIBRARY       a model in `optimum`'s form, with or without pooling
    optimum_backend.py save SOURCE TARGET                a model in sentence-transformers' form

TEXTS is a JSON file with a list of texts, OUT an .npy file.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def session(folder: str, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, backend="onnx", device="cpu", local_files_only=True, **options)


def encode(folder: str, texts: str, out: str, file: str = "model.onnx") -> None:
    model = session(folder, model_kwargs={"file_name": file, "provider": "CPUExecutionProvider"})
    np.save(out, model.encode(json.loads(Path(texts).read_text()), batch_size=4))


def encode_queries(folder: str, texts: str, out: str) -> None:
    np.save(out, session(folder).encode_query(json.loads(Path(texts).read_text())))


def classify(folder: str, texts: str, out: str) -> None:
    import torch
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    model = ORTModelForSequenceClassification.from_pretrained(
        folder, subfolder="onnx", file_name="model.onnx", local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = tokenizer(json.loads(Path(texts).read_text()), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        np.save(out, model(**batch).logits.numpy())


def write(source: str, target: str, library: str) -> None:
    from optimum.exporters.onnx import main_export

    main_export(source, target, task="feature-extraction", library_name=library)


def save(source: str, target: str) -> None:
    session(source, model_kwargs={"export": True}).save_pretrained(target)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    actions: dict[str, Callable[..., None]] = {
        "encode": encode,
        "encode-queries": encode_queries,
        "classify": classify,
        "write": write,
        "save": save,
    }
    actions[sys.argv[1]](*sys.argv[2:])
