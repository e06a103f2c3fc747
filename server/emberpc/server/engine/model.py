"""A bundle made ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from emberpc.bundle import (
    PROBES,
    Bound,
    Bundle,
    BundleError,
    Interface,
    Manifest,
    UnstatedError,
    Variant,
    open_bundle,
)
from emberpc.server.engine.session import OnnxSession, Output, SessionError
from emberpc.server.engine.tokenizing import TextTokenizer, TokenIds, Truncation
from emberpc.server.errors import items_of

#: How far the outputs of fp32 for the bundle's reference texts may be from PyTorch's. Other processors round
#: otherwise; a wrong tokenizer or graph is off by far more. Other variants state a bound of their own.
_FP32_BOUND = Bound(cosine_min=0.99, difference_max=1e-2)
#: Enough to tell a wrong model from a right one without holding up the start.
_REFERENCE_TEXTS = 4

#: Told what is being done.
Tell = Callable[[str], None]


class ModelLoadError(Exception):
    """A model cannot be served; the message names it, what is wrong and the remedy."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model that is served under a name.

    `folder` and `options` are where it came from and what was stated of it.
    """

    name: str
    folder: Path
    options: Mapping[str, str]
    manifest: Manifest
    variant: Variant
    tokenizer: TextTokenizer
    session: OnnxSession
    interface: Interface
    size_bytes: int
    loaded: datetime

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that shapes the model's vectors."""
        return self.manifest.fingerprint(self.variant.name)

    def run(self, batch: Sequence[TokenIds]) -> Output:
        """Run texts' token ids as one batch; float32 (texts, dimensions or labels)."""
        return self.session.run(batch, self.interface, self.manifest.pad_token_id)

    @classmethod
    def load(
        cls,
        name: str,
        folder: Path,
        variant_name: str = "",
        options: Mapping[str, str] | None = None,
        tell: Tell = lambda stage: None,
    ) -> Model:
        """Read a bundle, check it, load it, and see that it gives what it gave when it was exported.

        A folder that emberpc did not write is served by what it says of itself,
        and checked for giving a text the same alone and in a batch.

        Args:
            name: the name to serve it under.
            folder: the bundle.
            variant_name: which of its ONNX files; empty: the first.
            options: what is stated of a foreign model; see `emberpc.bundle.Stated`.
            tell: called with each stage as it begins.

        Raises:
            ModelLoadError: the bundle is damaged or does not do what it did at export, or something has to be stated.
        """
        sessions: dict[Path, OnnxSession] = {}

        def load(path: Path) -> OnnxSession:
            if path not in sessions:
                sessions[path] = OnnxSession(path)
            return sessions[path]

        try:
            tell("checking the files")
            bundle = open_bundle(folder, options or {}, lambda path: load(path).graph)
            manifest = bundle.manifest
            variant = manifest.variant(variant_name)
            tell("loading the weights")
            session = load(bundle.model_path(variant))
            model = cls(
                name=name,
                folder=folder,
                options=dict(options or {}),
                manifest=manifest,
                variant=variant,
                tokenizer=_tokenizer(bundle),
                session=session,
                interface=bundle.interface(session.graph),
                size_bytes=manifest.files[variant.path].size,
                loaded=datetime.now(timezone.utc),
            )
            tell("warming up")
            model._check(bundle)
        except UnstatedError as error:
            raise ModelLoadError(
                f"model {name!r}: {error}; state it with --model-option {name}.{error.option}"
            ) from error
        except (BundleError, SessionError) as error:
            raise ModelLoadError(f"model {name!r}: {error}") from error
        return model

    def _check(self, bundle: Bundle) -> None:
        """Run some texts, which warms the model up too.

        Raises:
            ModelLoadError: the outputs are not those of the export, or of a foreign model, those of other batches.
            BundleError: the output is of no shape that can be served.
        """
        reference = None if bundle.foreign else bundle.reference()
        texts = PROBES if reference is None else reference.texts[:_REFERENCE_TEXTS]
        tokens = [text.ids for text in self.tokenizer.tokenize(texts, "", Truncation.END, items_of("texts"))]
        try:
            got = self.run(tokens)
            if reference is None:
                expected = np.concatenate([self.run([ids]) for ids in tokens])
            else:
                expected = reference.embeddings if reference.logits is None else reference.logits
        except BundleError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise ModelLoadError(f"model {self.name!r}: {bundle.folder} loads but does not run") from error
        width = len(self.manifest.labels) or self.manifest.dimensions
        if got.shape[1] != width:
            raise BundleError(f"the output {self.interface.output} has {got.shape[1]} values for a text, not {width}")
        if _alike(got, expected[: len(tokens)], self.variant.bound or _FP32_BOUND):
            return
        if reference is None:
            raise ModelLoadError(
                f"model {self.name!r}: {bundle.folder} gives a text another vector in a batch than alone; "
                "is its padding masked? see `emberpc verify`, and export the model again"
            )
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
