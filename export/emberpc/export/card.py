"""The model card: the README.md of a bundle, made from the bundle's manifest."""

from __future__ import annotations

from emberpc.bundle import Manifest, Task
from emberpc.bundle.calibration import weakness


def model_card(manifest: Manifest) -> str:
    """Return the model card of a bundle as Markdown, with the front matter that model hubs read."""
    classifier = manifest.task is Task.CLASSIFICATION
    tag = "text-classification" if classifier else "sentence-similarity"
    prompts = [f"{kind} {text!r}" for kind, text in vars(manifest.prompts).items() if text]
    facts = {
        "Base model": f"{manifest.base_model}, revision {manifest.revision}",
        "Weights (SHA-256)": manifest.weights_sha256,
        "Dimensions": str(manifest.dimensions),
        "Pooling": manifest.pooling + (", then normalised to length 1" if manifest.normalize else ""),
        "Maximum number of tokens": str(manifest.max_tokens),
        "Prompts": ", ".join(prompts) or "none",
    }
    if manifest.strategy and not classifier:
        facts["Fine-tuned by"] = manifest.strategy
    if classifier:
        facts["Labels"] = ", ".join(manifest.labels)
        facts["Strategy"] = manifest.strategy or "not stated"
        facts["Temperature"] = f"{manifest.temperature:.4g}"
        if few := weakness(int(manifest.quality.get("held_out_texts", 0))):
            facts["Calibration"] = f"rough: {few}"
        rule = manifest.decision_rule
        if rule.rejection_threshold is not None:
            score = rule.rejection_score.value
            facts["Out of scope"] = f"texts whose rejection score {score} is below {rule.rejection_threshold:.4g}"
        if manifest.rejection_measured_on:
            facts["Error rates of the rejection"] = f"measured on {manifest.rejection_measured_on}"
    lines = [
        f"---\npipeline_tag: {tag}\nlibrary_name: emberpc\ntags:\n- onnx\n- emberpc\n---\n",
        f"# {manifest.base_model}, exported for emberpc\n",
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "\n## Against PyTorch\n",
        "| variant | file | texts | minimum cosine | greatest difference | same label |\n|---|---|---|---|---|---|",
    ]
    for variant in manifest.variants:
        parity = variant.parity
        lines.append(
            f"| {variant.name} | `{variant.path}` | {parity.texts} | {parity.cosine_min:.6f} | "
            f"{parity.max_abs_diff:.2g} | {parity.label_agreement:.3f} |"
        )
    lines += _variants(manifest)
    if manifest.quality:
        lines += ["\n## Measured at export\n", "| figure | value |\n|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in manifest.quality.items()]
    lines += [
        "\n## Use\n",
        "```console\n$ emberpc verify DIR\n$ emberpc serve --model NAME=DIR\n```\n",
        f"Made on {manifest.created} with "
        + ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _variants(manifest: Manifest) -> list[str]:
    """Return lines of Markdown: a table of the variants' figures against fp32, and the variants that were dropped.

    The list is empty if fewer than two variants were measured and none was dropped.
    """
    rows = [(variant, variant.measured) for variant in manifest.variants if variant.measured is not None]
    if len(rows) < 2 and not manifest.dropped:
        return []
    classifier = manifest.task is Task.CLASSIFICATION
    share = "same label" if classifier else "same 10 nearest"
    searched = rows[0][1].ndcg_at_10 is not None
    titles = ["variant", "mean cosine", "minimum cosine", share]
    titles += [*(["accuracy"] if classifier else []), *(["nDCG@10"] if searched else [])]
    titles += ["texts per CPU-second", "times fp32", "MB", "seconds to load"]
    lines = ["\n## Variants, against fp32\n", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant, found in rows:
        agreement = found.label_agreement if classifier else found.neighbour_agreement
        cells = [variant.name, f"{found.cosine_mean:.4f}", f"{found.cosine_min:.4f}", f"{agreement:.3f}"]
        cells += [f"{figure:.4f}" for figure in (found.accuracy, found.ndcg_at_10) if figure is not None]
        cells += [f"{found.texts_per_cpu_second:.0f}", f"{found.speedup:.2f}", f"{found.size_bytes / 1e6:.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{found.load_seconds:.2f}'])} |")
    if manifest.measured_on:
        lines.append(f"\nMeasured on {rows[0][1].texts} texts: {manifest.measured_on}.")
    lines.append("\nServe one with `--variant NAME=VARIANT`. Never mix variants in one collection.")
    lines += [f"\nTried and not kept: {name}: {reason}." for name, reason in manifest.dropped.items()]
    return lines
