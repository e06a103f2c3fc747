"""A bundle made ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from emberpc.bundle import (
    PROBES,
    Bound,
    Bundle,
    BundleError,
    Head,
    Manifest,
    Task,
    UnstatedError,
    Variant,
    open_bundle,
)
from emberpc.bundle.contents import Contents
from emberpc.server.engine.models.encoders import Encoder, Encoders
from emberpc.server.engine.sessions.onnx_runtime import OnnxSession, Output, SessionError
from emberpc.server.engine.tokenizing import TextTokenizer, Truncation
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

    `folder` and `options` are where it came from and what was stated of it. `fingerprint` is a SHA-256 (hex) of all
    bytes that decide its vectors. `legacy_fingerprint` is that of the old scheme; empty if it does not cover all
    weights.
    """

    name: str
    folder: Path
    options: Mapping[str, str]
    manifest: Manifest
    variant: Variant
    tokenizer: TextTokenizer
    encoder: Encoder
    #: Of a classifier, if it is not in what the encoder runs.
    head: Head | None
    size_bytes: int
    loaded: datetime
    fingerprint: str
    legacy_fingerprint: str

    def finish(self, output: Output) -> Output:
        """Make the model's output of its encoder's: float32 (texts, dimensions or labels)."""
        return output if self.head is None else self.head.logits(output)

    @classmethod
    def load(
        cls,
        name: str,
        folder: Path,
        variant_name: str = "",
        options: Mapping[str, str] | None = None,
        encoders: Encoders | None = None,
        *,
        fresh: bool = False,
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
            encoders: those in use, to share one with other models; default: it gets one of its own.
            fresh: load its files though an encoder like theirs is in use; a classifier whose own is the head shares it.
            tell: called with each stage as it begins.

        Raises:
            ModelLoadError: the bundle is damaged or does not do what it did at export, or something has to be stated.
        """
        loading = _Loading()
        try:
            tell("checking the files")
            bundle = open_bundle(
                folder,
                options or {},
                lambda path: loading.session(path).graph,
                check_hashes=False,
                contents=loading.contents,
            )
            loading.contents.read(bundle.model_path(bundle.manifest.variant(variant_name)))
            # On cores of their own: each hashing takes about as long as loading does.
            with ThreadPoolExecutor(2, thread_name_prefix="hashes") as beside:
                hashes = beside.submit(bundle.check_hashes, loading.contents)
                tell("loading the weights")
                try:
                    model = cls._of(
                        name, folder, bundle, variant_name, options or {}, loading, encoders, beside, fresh=fresh
                    )
                except (BundleError, SessionError):
                    hashes.result()  # that a file changed is the better reason
                    raise
                hashes.result()
            bundle.check_contents(loading.contents)
            tell("warming up")
            model._check(bundle)
        except UnstatedError as error:
            raise ModelLoadError(
                f"model {name!r}: {error}; state it with --model-option {name}.{error.option}"
            ) from error
        except (BundleError, SessionError) as error:
            raise ModelLoadError(f"model {name!r}: {error}") from error
        return model

    @classmethod
    def _of(
        cls,
        name: str,
        folder: Path,
        bundle: Bundle,
        variant_name: str,
        options: Mapping[str, str],
        loading: _Loading,
        encoders: Encoders | None,
        beside: Executor,
        *,
        fresh: bool,
    ) -> Model:
        """Load what a bundle holds; the weights are hashed in `beside` while they are loaded."""
        manifest = bundle.manifest
        variant = manifest.variant(variant_name)
        head = bundle.head()

        path = bundle.model_path(variant)
        entry = manifest.files[variant.path]

        def load_encoder() -> Encoder:
            session = loading.session(path)
            interface = bundle.interface(session.graph, headless=head is not None)
            return Encoder(session, interface, manifest.pad_token_id, entry.sha256)

        # One that gives logits is of no use to others.
        vectors = head is not None or manifest.task is Task.EMBEDDING
        shared = encoders if encoders is not None and vectors else Encoders()
        fresh = fresh and head is None
        # Before the file is loaded: none may lie outside the folder.
        bundle.external_files(variant.name, loading.contents)
        fingerprinting = beside.submit(
            bundle.fingerprint, variant.name, headless=head is not None, contents=loading.contents
        )
        if fresh or shared.is_empty:  # no encoder in use can be shared, so the fingerprint need not be known first
            try:
                loading.session(path)
            except SessionError:
                fingerprinting.result()  # what is wrong with the file says more
                raise
        fingerprint = fingerprinting.result()
        encoder = shared.get(fingerprint, manifest.max_tokens, load_encoder, fresh=fresh)
        if head is None and encoder.sha256 != entry.sha256:
            # Another file gives the same vectors. This one must load as well, or the folder is not fit to be served.
            load_encoder()
        return cls(
            name=name,
            folder=folder,
            options=dict(options),
            manifest=manifest,
            variant=variant,
            tokenizer=_tokenizer(bundle, loading.contents),
            encoder=encoder,
            head=head,
            size_bytes=entry.size,
            loaded=datetime.now(timezone.utc),
            fingerprint=fingerprint,
            legacy_fingerprint=bundle.legacy_fingerprint(variant.name),
        )

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
            got = self.finish(self.encoder.run(tokens))
            if reference is None:
                expected = np.concatenate([self.encoder.run([ids]) for ids in tokens])
            else:
                expected = reference.embeddings if reference.logits is None else reference.logits
        except BundleError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise ModelLoadError(f"model {self.name!r}: {bundle.folder} loads but does not run") from error
        width = len(self.manifest.labels) or self.manifest.dimensions
        if got.shape[1] != width:
            output = self.encoder.interface.output
            raise BundleError(f"the output {output} has {got.shape[1]} values for a text, not {width}")
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


class _Loading:
    """The files and sessions of one model that is being loaded; the files are in memory until it is loaded."""

    def __init__(self) -> None:
        self.contents = Contents()
        self._sessions: dict[Path, OnnxSession] = {}

    def session(self, path: Path) -> OnnxSession:
        """Return the session of an ONNX file, which is made when it is first asked for.

        Raises:
            SessionError: the file does not load.
        """
        if path not in self._sessions:
            self._sessions[path] = OnnxSession(path, contents=self.contents)
        return self._sessions[path]


def _alike(got: Output, expected: Output, bound: Bound) -> bool:
    return got.shape == expected.shape and not bound.faults(expected, got)


def _tokenizer(bundle: Bundle, contents: Contents) -> TextTokenizer:
    try:
        return TextTokenizer(bundle.tokenizer_path, bundle.manifest.max_tokens, contents)
    except Exception as error:  # the library raises plain Exception for whatever it cannot parse
        raise BundleError(
            f"{bundle.tokenizer_path} is no tokenizer that can be read; export the model again"
        ) from error
