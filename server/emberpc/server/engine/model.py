"""A bundle made ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from emberpc.bundle import Bound, Bundle, BundleError, Manifest, Task, Variant, read_bundle
from emberpc.server.engine.session import OnnxSession, Output, SessionError
from emberpc.server.engine.tokenizing import TextTokenizer, Truncation
from emberpc.server.errors import items_of

#: How far the outputs of fp32 for the bundle's reference texts may be from PyTorch's. Other processors round
#: otherwise; a wrong tokenizer or graph is off by far more. Other variants state a bound of their own.
_FP32_BOUND = Bound(cosine_min=0.99, difference_max=1e-2)
#: Enough to tell a wrong model from a right one without holding up the start.
_REFERENCE_TEXTS = 4


class ModelLoadError(Exception):
    """A model cannot be served; the message names it, what is wrong and the remedy."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model that is served under a name."""

    name: str
    manifest: Manifest
    variant: Variant
    tokenizer: TextTokenizer
    session: OnnxSession
    size_bytes: int
    loaded: datetime

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that shapes the model's vectors."""
        return self.manifest.fingerprint(self.variant.name)

    @classmethod
    def load(cls, name: str, folder: Path, variant_name: str = "") -> Model:
        """Read a bundle, check it, load it, and see that it gives what it gave when it was exported.

        Args:
            name: the name to serve it under.
            folder: the bundle.
            variant_name: which of its ONNX files; empty: the first.

        Raises:
            ModelLoadError: the bundle is damaged or does not do what it did at export.
        """
        try:
            bundle = read_bundle(folder)
            manifest = bundle.manifest
            variant = manifest.variant(variant_name)
            output = "logits" if manifest.task is Task.CLASSIFICATION else "sentence_embedding"
            model = cls(
                name=name,
                manifest=manifest,
                variant=variant,
                tokenizer=_tokenizer(bundle),
                session=OnnxSession(bundle.model_path(variant), output, manifest.pad_token_id),
                size_bytes=manifest.files[variant.path].size,
                loaded=datetime.now(timezone.utc),
            )
            model._check(bundle)
        except (BundleError, SessionError) as error:
            raise ModelLoadError(f"model {name!r}: {error}") from error
        return model

    def _check(self, bundle: Bundle) -> None:
        """Run some of the reference texts, which warms the model up too.

        Raises:
            ModelLoadError: the outputs are not those of the export.
        """
        reference = bundle.reference()
        expected = reference.embeddings if reference.logits is None else reference.logits
        texts = self.tokenizer.tokenize(reference.texts[:_REFERENCE_TEXTS], "", Truncation.END, items_of("texts"))
        try:
            got = self.session.run([text.ids for text in texts])
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise ModelLoadError(f"model {self.name!r}: {bundle.folder} loads but does not run") from error
        if not _alike(got, expected[: len(texts)], self.variant.bound or _FP32_BOUND):
            raise ModelLoadError(
                f"model {self.name!r}: {bundle.folder} does not give the outputs that it gave at export; "
                "see `emberpc verify`, and export the model again"
            )


def _alike(got: Output, expected: Output, bound: Bound) -> bool:
    return got.shape == expected.shape and not bound.faults(expected, got)


def _tokenizer(bundle: Bundle) -> TextTokenizer:
    try:
        return TextTokenizer(bundle.tokenizer_path, bundle.manifest.max_tokens)
    except Exception as error:  # the library raises plain Exception for whatever it cannot parse
        raise BundleError(
            f"{bundle.tokenizer_path} is no tokenizer that can be read; export the model again"
        ) from error
