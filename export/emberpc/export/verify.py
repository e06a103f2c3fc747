"""Check a bundle on any host: needs ONNX Runtime and tokenizers, not PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from emberpc.bundle import Bundle, BundleError, Reference, Task, Variant, read_bundle
from emberpc.export.parity import compare, faults
from emberpc.export.runner import Runner


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    ok: bool
    detail: str


@dataclass
class VerifyReport:
    """What was checked, and figures of each variant measured on the way, such as `fp32.load_seconds`."""

    folder: Path
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything is as it should be."""
        return all(check.ok for check in self.checks)


def verify_bundle(folder: Path | str) -> VerifyReport:
    """Check that a bundle is whole and gives what PyTorch gave when it was exported.

    Args:
        folder: the bundle.

    Returns:
        The report; its checks end at the first one that leaves nothing more to check.
    """
    report = VerifyReport(Path(folder))
    try:
        bundle = read_bundle(folder)
        reference = bundle.reference()
    except BundleError as error:
        report.checks.append(Check("files", ok=False, detail=str(error)))
        return report
    count = len(bundle.manifest.files)
    report.checks.append(Check("files", ok=True, detail=f"{count} files with the hashes of the manifest"))
    for variant in bundle.manifest.variants:
        report.checks.extend(_check_variant(bundle, variant, reference, report))
    return report


def _check_variant(bundle: Bundle, variant: Variant, reference: Reference, report: VerifyReport) -> Iterator[Check]:
    """Load a variant and run the reference texts, each alone and all together."""
    manifest = bundle.manifest
    start = perf_counter()
    try:
        runner = Runner(bundle.model_path(variant), bundle.tokenizer_path, manifest.max_tokens, manifest.pad_token_id)
    except Exception as error:  # neither ONNX Runtime nor tokenizers has a base class for what it raises
        yield Check(f"{variant.name} loads", ok=False, detail=f"{type(error).__name__}; export the model again")
        return
    report.figures[f"{variant.name}.load_seconds"] = perf_counter() - start
    output, expected = "sentence_embedding", reference.embeddings
    if manifest.task is Task.CLASSIFICATION and reference.logits is not None:
        output, expected = "logits", reference.logits
    if output not in runner.outputs:
        yield Check(f"{variant.name} loads", ok=False, detail=f"it has no output {output!r}, only {runner.outputs}")
        return
    yield Check(f"{variant.name} loads", ok=True, detail=f"outputs {', '.join(runner.outputs)}")
    scale = max(1.0, float(abs(expected).max()))
    for how, batch_size in (("one by one", 1), ("in one batch", len(reference.texts))):
        start = perf_counter()
        got = runner.run(reference.texts, output, batch_size=batch_size)
        report.figures[f"{variant.name}.texts_per_second"] = len(reference.texts) / (perf_counter() - start)
        if got.shape != expected.shape:
            yield Check(f"{variant.name} {how}", ok=False, detail=f"outputs of shape {got.shape}, not {expected.shape}")
            continue
        parity = compare(expected, got, labels=output == "logits")
        found = faults(parity, scale)
        detail = "; ".join(found) or f"cosine at least {parity.cosine_min:.6f} on {parity.texts} texts"
        yield Check(f"{variant.name} {how}", ok=not found, detail=detail)
