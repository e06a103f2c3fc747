"""Make and measure the variants of a bundle: those that the caller names, or with `auto` all worth their space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from emberpc.bundle import Manifest, Measured, Parity, Variant
from emberpc.export.convert.graph import check_size, save_model
from emberpc.export.convert.parity import compare
from emberpc.export.data.examples import Examples, evenly
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.errors import ExportError
from emberpc.export.names import AUTO, FP32, check_variants
from emberpc.export.progress import Progress, no_progress
from emberpc.export.retrieval.queries import Judged
from emberpc.export.variants.candidates import CANDIDATES, Candidate, Material
from emberpc.export.variants.measurement import (
    MAX_PASSAGES,
    MAX_QUERIES,
    MAX_TEXTS,
    TIMED_TEXTS,
    Trial,
    check_texts,
)

#: Minimum speed, in texts per CPU-second as a multiple of fp32's, that counts as a gain for `auto`. A smaller
#: difference may be noise.
_FASTER = 1.1
#: Maximum number of texts to calibrate `int8-static` with.
_CALIBRATION_TEXTS = 512
#: Number of texts of the user that suffices to calibrate. Docstrings are added to fewer texts.
_ENOUGH_TEXTS = 128
#: Maximum share of the user's texts that are measured on, if a variant is calibrated with the others.
_MEASURED_SHARE = 2 / 3
#: Greatest size, in bytes as a share of fp32's, that counts as a gain for `auto`. A smaller saving does not justify a
#: second file.
_SMALLER = 0.75


def add_variants(
    folder: Path,
    manifest: Manifest,
    names: Sequence[str],
    *,
    texts: Sequence[str] = (),
    examples: Examples | None = None,
    judged: Judged | None = None,
    training: Sequence[str] = (),
    measured_on: str,
    progress: Progress = no_progress,
) -> Manifest:
    """Measure a bundle's fp32, then make, measure and add the requested variants.

    Args:
        folder: the bundle, with fp32, tokenizer and reference; variants are written to it.
        manifest: the bundle's manifest so far.
        names: names of candidates, or `auto`: all candidates that meet their bounds and are worth their space. fp32 may
            be named, and is always included.
        texts: texts to measure an embedding model on; none: mostly docstrings of Python's standard library.
        examples: labelled texts to measure a classifier on, used instead of `texts`.
        judged: queries and passages to measure an embedding model's retrieval on, used instead of `texts`. If only fp32
            is measured, `judged` is ignored.
        training: texts that the model was trained on, to calibrate `int8-static` with. The texts above that are not
            measured on calibrate it, too.
        measured_on: description of the texts that are measured on, for the manifest.
        progress: called before each variant is made and measured, fp32 included.

    Returns:
        The manifest with all measurements; `dropped` has the reason for each candidate that `auto` left out, whose file
        is deleted.

    Raises:
        ExportError: a name is invalid, there are fewer than 2 texts to measure on, fp32 cannot be run, or a variant
            requested by name cannot be made or run or misses its bound (the error has the figure and the bound). The
            files of variants stay.
        OSError: the disk is full.
    """
    check_variants(names)
    chosen = [candidate for candidate in CANDIDATES if AUTO in names or candidate.name in names]
    calibrated = any(candidate.calibrated for candidate in chosen)
    maximum = MAX_TEXTS if chosen else TIMED_TEXTS
    if calibrated and texts:
        maximum = min(maximum, max(2, int(len(set(texts)) * _MEASURED_SHARE)))
    trial = _trial(folder, manifest, texts, examples, judged if chosen else None, maximum)
    if calibrated:
        given = [*texts, *(examples.texts if examples else ()), *(judged.passages if judged else ()), *training]
        trial = replace(trial, calibration=_calibration(given, trial))
    stage, texts_shown = "measuring variants" if chosen else "measuring speed", f"{len(trial.texts)} texts"
    progress(stage, 0, len(chosen) + 1, f"{FP32}, {texts_shown}")
    first, _ = trial.measure(trial.fp32_path)
    variants = [replace(manifest.variant(), measured=first)]
    dropped: dict[str, str] = {}
    for done, candidate in enumerate(chosen, 1):
        progress(stage, done, len(chosen) + 1, f"{candidate.name}, {texts_shown}")
        try:
            variant = _make(trial, candidate)
            if AUTO in names:
                _require_gain(variant, variants)
        except ExportError as error:
            if AUTO not in names:
                raise ExportError(f"the variant {candidate.name}: {error}; nothing was written") from error
            (folder / candidate.path).unlink(missing_ok=True)
            dropped[candidate.name] = str(error)
        else:
            variants.append(variant)
    version = 3 if any(variant.engine for variant in variants) else manifest.format_version
    return replace(manifest, variants=tuple(variants), dropped=dropped, measured_on=measured_on, format_version=version)


def _trial(
    folder: Path,
    manifest: Manifest,
    texts: Sequence[str],
    examples: Examples | None,
    judged: Judged | None,
    maximum: int,
) -> Trial:
    """Return a trial on a sample of texts. Raises ExportError if the sample has fewer than 2 texts.

    With `judged`, the sample is that of `Judged.few`: at most `MAX_QUERIES` queries and `MAX_PASSAGES` passages.
    Otherwise the sample has at most `maximum` texts, taken at equal distances: texts of `examples`; without `examples`,
    distinct texts of `texts`; if `texts` is empty, too, mostly docstrings of Python's standard library.
    """
    if judged is not None:
        few = judged.few(MAX_QUERIES, MAX_PASSAGES)
        check_texts(few.passages)
        return Trial(folder, manifest, few.passages, queries=few.queries)
    if examples is not None:
        taken = examples.take(evenly(len(examples.texts), maximum))
        check_texts(taken.texts)
        return Trial(folder, manifest, taken.texts, taken.targets)
    texts = list(dict.fromkeys(texts)) or sample_texts(maximum)
    check_texts(texts)
    return Trial(folder, manifest, [texts[row] for row in evenly(len(texts), maximum)])


def _calibration(given: Sequence[str], trial: Trial) -> list[str]:
    """Return at most 512 texts that the trial does not measure on: those of `given`, with docstrings if few."""
    measured = {*trial.texts, *(trial.queries.texts if trial.queries else ())}
    texts = [text for text in dict.fromkeys(given) if text not in measured]
    if len(texts) < _ENOUGH_TEXTS:
        measured.update(texts)
        docstrings = [text for text in sample_texts(4 * _CALIBRATION_TEXTS) if text not in measured]
        texts += [docstrings[row] for row in evenly(len(docstrings), _CALIBRATION_TEXTS - len(texts))]
    return [texts[row] for row in evenly(len(texts), _CALIBRATION_TEXTS)]


def _make(trial: Trial, candidate: Candidate) -> Variant:
    """Make a candidate, write its ONNX file, measure it, and return the variant.

    Raises:
        ExportError: the candidate cannot be made from this model or cannot be run, or misses its bound. If its file was
            written, the file stays.
        OSError: the disk is full.
    """
    path = trial.folder / candidate.path
    model = onnx.load(str(trial.folder / trial.fp32_path))
    check_size(model)
    material = Material(model, trial.singles, trial.calibrating)
    save_model(candidate.make(material), path)
    measured, faults = trial.measure(candidate.path, candidate.bound, candidate.engine)
    if faults:
        raise ExportError("; ".join(faults))
    return Variant(
        candidate.name, candidate.path, _parity(trial, candidate), candidate.bound, measured, candidate.engine
    )


def _parity(trial: Trial, candidate: Candidate) -> Parity:
    """Compare a candidate with PyTorch's reference outputs, and check `cosine_min` and `difference_max` of its bound.

    `emberpc verify` makes the same check. Each output is checked with the texts one by one and all in one batch.

    Returns:
        The agreement with PyTorch in one batch: of the logits, or of the vectors of an embedding model.

    Raises:
        ExportError: an output misses the bound, or the candidate cannot be run.
    """
    reference, (runner, _) = trial.reference, trial.load(candidate.path, candidate.engine)
    outputs = {"sentence_embedding": reference.vectors}
    if reference.logits is not None:
        outputs["logits"] = reference.logits
    for output, expected in outputs.items():
        # In int8, a text's output depends on the other texts of its batch, so batches of one and of all are checked.
        for how, size in (("one by one", 1), ("in one batch", len(reference.texts))):
            got = runner.run(reference.texts, output, batch_size=size)
            if faults := candidate.bound.faults(expected, got):
                raise ExportError(f"{output} of the reference texts {how}: {'; '.join(faults)}")
    return compare(expected, got, labels=reference.logits is not None)


def _require_gain(variant: Variant, kept: Sequence[Variant]) -> None:
    """Raise ExportError if a variant is not worth its space.

    A variant is worth its space if it has at least 1.1 times the speed or at most 75 % of the size of fp32, and no
    other variant in `kept`, apart from fp32, is at least as good in speed, size and mean cosine to fp32.

    Args:
        variant: the variant; it must have been measured.
        kept: the variants kept before, all measured; fp32 is the first.
    """
    own, fp32 = _measured(variant), _measured(kept[0])
    if own.speedup < _FASTER and own.size_bytes > _SMALLER * fp32.size_bytes:
        raise ExportError(
            f"{own.speedup:.2f} times fp32's texts per CPU-second and {own.size_bytes / fp32.size_bytes:.0%} of its "
            f"size; a gain would be {_FASTER} times, or {_SMALLER:.0%}"
        )
    for other in kept[1:]:
        theirs = _measured(other)
        if (
            theirs.speedup >= own.speedup
            and theirs.size_bytes <= own.size_bytes
            and theirs.cosine_mean >= own.cosine_mean
        ):
            raise ExportError(f"{other.name} is faster, smaller and nearer to fp32")


def _measured(variant: Variant) -> Measured:
    if variant.measured is None:
        raise ExportError(f"the variant {variant.name} was not measured")
    return variant.measured
