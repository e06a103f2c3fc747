"""Print what an export made: the settings, the measured quality and the variants of a bundle."""

from __future__ import annotations

import shlex
from pathlib import Path

from emberpc.bundle import Manifest, Task
from emberpc.cli.output import Column, note, print_blank_line, print_fields, print_json, print_table

#: Names under which figures of held-out texts are printed, by their names in the manifest.
_HELD_OUT = {name: f"held-out {name}" for name in ("accuracy", "macro_f1", "micro_f1", "ece", "ece_uncalibrated")}


def show_bundle(manifest: Manifest, folder: Path, as_json: bool) -> None:
    """Print the settings, the measured quality and the variants of a new bundle, and on stderr how to serve and ask it.

    `as_json`: print only the manifest, as one line of JSON.
    """
    if as_json:
        print_json([manifest])
        return
    print_fields(
        {
            "folder": folder,
            "task": manifest.task.value,
            "base model": manifest.base_model,
            "dimensions": manifest.dimensions,
            "max tokens": manifest.max_tokens,
            **({"labels": manifest.labels} if manifest.labels else {}),
            **({"strategy": manifest.strategy} if manifest.strategy else {}),
            **_rejection(manifest),
            **{_HELD_OUT.get(name, name).replace("_", " "): f"{value:.4g}" for name, value in manifest.quality.items()},
        }
    )
    print_blank_line()
    if manifest.rejection_measured_on:
        note(f"the rates of false rejections and acceptances were measured on {manifest.rejection_measured_on}")
    _show_variants(manifest)
    name = folder.resolve().name
    ask = f"emberpc classify TEXT --classifier {name}" if manifest.labels else f"emberpc embed TEXT --model {name}"
    note(f"next: `emberpc serve --model {shlex.quote(f'{name}={folder}')}`, and in another terminal `{ask}`")


def _rejection(manifest: Manifest) -> dict[str, str]:
    """Return the lines about the rejection score of a classifier, by title; empty if it rejects no text."""
    rule = manifest.decision_rule
    if rule.rejection_threshold is None:
        return {}
    return {"rejection score": rule.rejection_score.value, "rejection threshold": f"{rule.rejection_threshold:.4g}"}


def _show_variants(manifest: Manifest) -> None:
    """Print a table of the measured variants, and on stderr the reason for each variant that was not kept.

    The texts that the variants were measured on are named on stderr too.
    """
    classifier = manifest.task is Task.CLASSIFICATION
    agreement = "same label" if classifier else "same 10 nearest"
    first = manifest.variant().measured
    titles = ["minimum cosine to PyTorch", "mean cosine to fp32", agreement, *(["accuracy"] if classifier else [])]
    titles += ["nDCG@10"] if first is not None and first.ndcg_at_10 is not None else []
    titles += ["texts per CPU-s", "times fp32", "MB", "load s"]
    rows = []
    for variant in manifest.variants:
        found = variant.measured
        if found is None:
            continue
        share = found.label_agreement if classifier else found.neighbour_agreement
        cells = [variant.name, f"{variant.parity.cosine_min:.6f}", f"{found.cosine_mean:.4f}", f"{share:.3f}"]
        cells += [f"{figure:.4f}" for figure in (found.accuracy, found.ndcg_at_10) if figure is not None]
        cells += [f"{found.texts_per_cpu_second:.1f}", f"{found.speedup:.2f}", f"{found.size_bytes / 1e6:.1f}"]
        rows.append([*cells, f"{found.load_seconds:.2f}"])
    print_table([Column("variant"), *(Column(title, "right") for title in titles)], rows)
    if manifest.measured_on:
        note(f"the table was measured on {manifest.measured_on}")
    for name, reason in manifest.dropped.items():
        note(f"{name} was not kept: {reason}")
