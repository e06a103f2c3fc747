"""Verify a bundle or a foreign folder on any host. Only a comparison with the source needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from tokenizers import Tokenizer

from emberpc.bundle import (
    PROBES,
    Bundle,
    BundleError,
    Parity,
    Reference,
    ScopeVectors,
    Task,
    UnstatedError,
    Variant,
    open_bundle,
)
from emberpc.export.convert.onnx_runner import Matrix, OnnxRunner
from emberpc.export.convert.parity import compare, faults
from emberpc.export.convert.sessions import look
from emberpc.export.errors import ExportError

T = TypeVar("T")

#: Names of the outputs that a bundle's graph must have, these only and in this order, by task.
_OUTPUTS = {
    Task.EMBEDDING: ["last_hidden_state", "sentence_embedding"],
    Task.CLASSIFICATION: ["logits", "sentence_embedding", "probabilities"],
}


@dataclass(frozen=True)
class Check:
    """Result of one check; `detail` says in words what was found, or what is wrong."""

    name: str
    ok: bool
    detail: str


@dataclass
class VerifyReport:
    """Results of the checks of a bundle or foreign folder that were made, and figures of each variant that was loaded.

    The name of a figure starts with that of the variant: `fp32.load_seconds` (wall time), `fp32.size_bytes` (the ONNX
    file without external weights), and `fp32.texts_per_second` (the reference texts in one batch, by wall time with
    tokenizing; not for a foreign folder).
    """

    folder: Path
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(check.ok for check in self.checks)


def verify_bundle(
    folder: Path | str, *, options: Mapping[str, str] | None = None, against: str | Path | None = None
) -> VerifyReport:
    """Verify that a bundle is complete and gives the outputs that PyTorch gave at export, within each variant's bound.

    A foreign folder has no reference outputs. Instead, a text must give nearly the same output alone and in a batch.

    Args:
        folder: the bundle or foreign folder.
        options: model options of a foreign folder, by the names of the fields of `emberpc.bundle.Stated`; none for a
            bundle.
        against: the PyTorch model to compare with (needs the extra `export`): a folder, an installed package that holds
            one, or a hub id. None: no comparison with PyTorch.

    Returns:
        The report; not `ok` if a check failed. Checks end at the first failure that makes further checks impossible.

    Raises:
        ImportError: `against` was given, and the extra `export` is not installed.
        OSError: the disk is full while the model of `against` is downloaded.
    """
    report = VerifyReport(Path(folder))
    bundle = _attempt(report, "files", lambda: _read(report.folder, options or {}))
    if bundle is None:
        return report
    tokenizer = _attempt(report, "tokenizer", lambda: _tokenizer(bundle))
    reference = None if bundle.foreign else _attempt(report, "reference", lambda: _reference(bundle))
    if tokenizer is None or (reference is None and not bundle.foreign):
        return report
    if bundle.manifest.rejection_score.needs_vectors:
        _attempt(report, "rejection score", lambda: _rejection_score(bundle))
    runners = {variant.name: _check_variant(bundle, variant, reference, report) for variant in bundle.manifest.variants}
    if against is not None:
        from emberpc.export.verify_source import compare_with_source

        for name, runner in runners.items():
            if runner is not None:
                _attempt(report, f"{name} against PyTorch", partial(compare_with_source, bundle, name, runner, against))
    return report


def _attempt(report: VerifyReport, name: str, look: Callable[[], tuple[T, str]]) -> T | None:
    """Run one check and add its result to the report.

    Args:
        report: report to add to.
        name: name of the check.
        look: does the check. It returns a value for later checks, and what was found, in words. It raises BundleError
            or ExportError if the check fails. Other errors are not caught.

    Returns:
        The value that `look` returned, or None if the check failed.
    """
    try:
        value, detail = look()
    except (BundleError, ExportError) as error:
        report.checks.append(Check(name, ok=False, detail=str(error)))
        return None
    report.checks.append(Check(name, ok=True, detail=detail))
    return value


def _read(folder: Path, options: Mapping[str, str]) -> tuple[Bundle, str]:
    try:
        bundle = open_bundle(folder, options, look)
    except UnstatedError as error:
        raise ExportError(f"{error}; state it with --model-option {error.option}") from error
    if bundle.foreign:
        return bundle, f"not written by emberpc; called with {bundle.foreign}"
    return bundle, f"{len(bundle.manifest.files)} files with the hashes of the manifest"


def _tokenizer(bundle: Bundle) -> tuple[Tokenizer, str]:
    try:
        tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    except Exception as error:  # the library raises plain Exception for anything that it cannot parse
        raise ExportError(f"{bundle.tokenizer_path} is not a tokenizer; export the model again") from error
    # A server switches truncation and padding of a foreign folder's tokenizer off, so only bundles are checked.
    if not bundle.foreign and (tokenizer.truncation or tokenizer.padding):
        raise ExportError(f"{bundle.tokenizer_path} truncates or pads by itself; export the model again")
    special, maximum = tokenizer.num_special_tokens_to_add(is_pair=False), bundle.manifest.max_tokens
    if maximum <= special:
        raise ExportError(f"max_tokens is {maximum}, and {special} special tokens are added; export the model again")
    return tokenizer, f"{tokenizer.get_vocab_size()} tokens, at most {maximum} of a text"


def _reference(bundle: Bundle) -> tuple[Reference, str]:
    reference, manifest = bundle.reference(), bundle.manifest
    matrices = [reference.vectors] if reference.logits is None else [reference.vectors, reference.logits]
    widths = [matrix.shape[1] for matrix in matrices]
    expected = [manifest.dimensions, *([len(manifest.labels)] if manifest.task is Task.CLASSIFICATION else [])]
    if widths != expected:
        raise ExportError(f"the reference has outputs of {widths} values, not {expected}; export the model again")
    return reference, f"{len(reference.texts)} texts"


def _rejection_score(bundle: Bundle) -> tuple[ScopeVectors | None, str]:
    scope = bundle.scope_vectors()
    count = 0 if scope is None else len(scope.vectors)
    return scope, f"{bundle.manifest.rejection_score.value}, {count} vectors"


def _check_variant(
    bundle: Bundle, variant: Variant, reference: Reference | None, report: VerifyReport
) -> OnnxRunner | None:
    """Load a variant and run texts, each alone and all in one batch; add results and figures to the report.

    Args:
        bundle: the bundle or foreign folder.
        variant: the variant.
        reference: the reference outputs; None for a foreign folder, which is run on other texts.
        report: report to add to.

    Returns:
        The runner, also if its results fail a check; None if the variant cannot be loaded, or the names of its outputs
        are wrong.
    """
    start = perf_counter()
    runner = _attempt(report, f"{variant.name} loads", lambda: _load(bundle, variant))
    if runner is None:
        return None
    report.figures[f"{variant.name}.load_seconds"] = perf_counter() - start
    report.figures[f"{variant.name}.size_bytes"] = bundle.manifest.files[variant.path].size
    if reference is None:
        _attempt(report, f"{variant.name} alone and in a batch", lambda: _run_foreign(bundle, runner))
        return runner
    for how, batch_size in (("one by one", 1), ("in one batch", len(reference.texts))):
        start = perf_counter()
        _attempt(report, f"{variant.name} {how}", partial(_run, runner, variant, reference, batch_size))
        report.figures[f"{variant.name}.texts_per_second"] = len(reference.texts) / (perf_counter() - start)
    return runner


def _load(bundle: Bundle, variant: Variant) -> tuple[OnnxRunner, str]:
    manifest = bundle.manifest
    runner = OnnxRunner(
        bundle.model_path(variant),
        bundle.tokenizer_path,
        manifest.max_tokens,
        manifest.pad_token_id,
        interface=bundle.foreign,
        engine=variant.engine,
    )
    expected = runner.outputs if bundle.foreign else _OUTPUTS[manifest.task]
    if runner.outputs != expected:
        raise ExportError(f"its outputs are {', '.join(runner.outputs)}, not {', '.join(expected)}; export it again")
    return runner, f"outputs {', '.join(runner.outputs)}"


def _run_foreign(bundle: Bundle, runner: OnnxRunner) -> tuple[None, str]:
    """Run texts through a foreign folder's model, each alone and all in one padded batch, and compare the outputs.

    Returns:
        None, and the result in words.

    Raises:
        ExportError: the model cannot be run; the outputs of a text differ by more than the limits of the parity check;
            or an output does not have a value for each dimension or label.
    """
    manifest, interface = bundle.manifest, bundle.foreign
    output = interface.output if interface else ""
    width = len(manifest.labels) or manifest.dimensions
    alone = runner.run(PROBES, output, batch_size=1)
    together = runner.run(PROBES, output, batch_size=len(PROBES))
    if alone.shape[1] != width:
        raise ExportError(f"{output} has {alone.shape[1]} values for a text, not {width}; correct the model option")
    parity = compare(alone, together)
    if found := faults(parity, scale=max(1.0, float(abs(alone).max()))):
        raise ExportError(f"{output} in a batch: {'; '.join(found)}; check that the graph masks padding")
    return None, f"{output} with a cosine of at least {parity.cosine_min:.6f} on {len(PROBES)} texts"


def _run(runner: OnnxRunner, variant: Variant, reference: Reference, batch_size: int) -> tuple[None, str]:
    """Run the reference texts in batches of `batch_size`, and compare the outputs with those of the reference.

    Returns:
        None, and the result in words.

    Raises:
        ExportError: the model cannot be run, or outputs have another shape, or miss the variant's bound (without a
            bound, the limits of the parity check).
    """
    words = []
    for output, expected in (("sentence_embedding", reference.vectors), ("logits", reference.logits)):
        if expected is None:
            continue
        got = runner.run(reference.texts, output, batch_size=batch_size)
        if got.shape != expected.shape:
            raise ExportError(f"{output} has the shape {got.shape}, not {expected.shape}; export the model again")
        parity = compare(expected, got, labels=output == "logits")
        if found := _faults(variant, parity, expected, got):
            raise ExportError(f"{output}: {'; '.join(found)}; export the model again")
        words.append(f"{output} with a cosine of at least {parity.cosine_min:.6f}")
    return None, f"{', '.join(words)} on {len(reference.texts)} texts"


def _faults(variant: Variant, parity: Parity, expected: Matrix, got: Matrix) -> list[str]:
    """Return a message for each limit that a variant's outputs miss; an empty list if they meet all limits.

    The limits are `cosine_min` and `difference_max` of the variant's bound. A variant without a bound, such as fp32,
    has the limits of the parity check; `parity` is the result of comparing `expected` and `got`.
    """
    if variant.bound is not None:
        return variant.bound.faults(expected, got)
    return faults(parity, scale=max(1.0, float(abs(expected).max())))
