"""The model card: a bundle's README.md, written from its manifest."""

from __future__ import annotations

from emberpc.bundle import Manifest, Task


def model_card(manifest: Manifest) -> str:
    """Return the card as Markdown with the front matter that model hubs read."""
    classifier = manifest.task is Task.CLASSIFICATION
    tag = "text-classification" if classifier else "sentence-similarity"
    prompts = [f"{kind} {text!r}" for kind, text in vars(manifest.prompts).items() if text]
    facts = {
        "Base model": f"{manifest.base_model}, revision {manifest.revision}",
        "Weights (SHA-256)": manifest.weights_sha256,
        "Dimensions": str(manifest.dimensions),
        "Pooling": manifest.pooling + (", then normalised to length 1" if manifest.normalize else ""),
        "Most tokens": str(manifest.max_tokens),
        "Prompts": ", ".join(prompts) or "none",
    }
    if classifier:
        facts["Labels"] = ", ".join(manifest.labels)
        facts["Strategy"] = manifest.strategy or "not stated"
        facts["Temperature"] = f"{manifest.temperature:.4g}"
        if manifest.rejection_logit is not None:
            facts["Out of scope"] = f"texts whose best logit is below {manifest.rejection_logit:.4g}"
    lines = [
        f"---\npipeline_tag: {tag}\nlibrary_name: emberpc\ntags:\n- onnx\n- emberpc\n---\n",
        f"# {manifest.base_model}, exported for emberpc\n",
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "\n## Against PyTorch\n",
        "| variant | file | texts | least cosine | greatest difference | same label |\n|---|---|---|---|---|---|",
    ]
    for variant in manifest.variants:
        parity = variant.parity
        lines.append(
            f"| {variant.name} | `{variant.path}` | {parity.texts} | {parity.cosine_min:.6f} | "
            f"{parity.max_abs_diff:.2g} | {parity.label_agreement:.3f} |"
        )
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
