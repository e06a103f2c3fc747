"""Load a bundle or a foreign folder as a model that can be served."""

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
    ScopeVectors,
    Task,
    UnstatedError,
    Variant,
    open_bundle,
)
from emberpc.bundle.contents import Contents
from emberpc.bundle.cores import multiplies_int8
from emberpc.server.engine.choices import ENGINES, RuntimePlan, Runtimes, version_of
from emberpc.server.engine.models.encoders import Encoder, Encoders
from emberpc.server.engine.models.extremes import ENGINE_BOUNDS, fault_at_the_limits
from emberpc.server.engine.sessions.runtime import Runtime
from emberpc.server.engine.sessions.session import Output, Session, SessionError
from emberpc.server.engine.tokenizing import TextTokenizer, Truncation
from emberpc.server.errors import items_of

#: Allowed difference between the outputs of the variant fp32 and those of PyTorch, for the bundle's reference texts.
#: Processors round differently. A wrong tokenizer or graph makes a far greater difference. The manifest holds the
#: bounds of other variants. For a foreign folder, this is the allowed difference between the outputs of a text alone
#: and in a batch.
_FP32_BOUND = Bound(cosine_min=0.99, difference_max=1e-2)
#: Maximum number of reference texts that are run when a model is loaded: enough to find a wrong model, and few enough
#: for a quick start.
_REFERENCE_TEXTS = 4

_ONNX_RUNTIME = Runtimes({"": "onnxruntime"})
#: Receives the name of each stage of loading as it begins, on the thread that loads.
OnStage = Callable[[str], None]


class ModelLoadError(Exception):
    """A model cannot be served; the message names the model and the problem, and the remedy if one is known."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model that is served under a name.

    Attributes:
        name: the name.
        folder: folder that the model was loaded from.
        options: options of a foreign model, as the server's settings give them; empty for a bundle.
        plan: how the model is run, and why.
        manifest: manifest of the bundle; of a foreign folder, the inferred manifest.
        variant: the variant of the bundle that is served.
        tokenizer: tokenizer of the model.
        encoder: encoder of the model, which other models may share.
        head: head of a classifier if the encoder does not compute the logits itself, else None.
        scope_vectors: vectors that the classifier's rejection score compares a text's vector with; None if the score
            needs none.
        size_bytes: bytes of the ONNX file, without external weight files.
        loaded: when the model was loaded, in UTC.
        fingerprint: SHA-256 (hex) of all that determines the model's vectors, except the length limit.
        classifier_fingerprint: SHA-256 (hex) of all that determines a classifier's labels; empty for other models.
        legacy_fingerprint: fingerprint by the rule of older versions; empty if that rule does not fit the model.
    """

    name: str
    folder: Path
    options: Mapping[str, str]
    plan: RuntimePlan
    manifest: Manifest
    variant: Variant
    tokenizer: TextTokenizer
    encoder: Encoder
    head: Head | None
    scope_vectors: ScopeVectors | None
    size_bytes: int
    loaded: datetime
    fingerprint: str
    classifier_fingerprint: str
    legacy_fingerprint: str

    def finish(self, output: Output) -> Output:
        """Convert the encoder's output, float32 (texts, width), to vectors or logits of this model.

        Returns:
            float32 (texts, dimensions or labels); `output` itself if the model has no head.
        """
        return output if self.head is None else self.head.logits(output)

    @classmethod
    def load(
        cls,
        name: str,
        folder: Path,
        variant_name: str = "",
        options: Mapping[str, str] | None = None,
        encoders: Encoders | None = None,
        runtimes: Runtimes | None = None,
        *,
        fresh: bool = False,
        on_stage: OnStage = lambda stage: None,
    ) -> Model:
        """Read, check and load a bundle or a foreign folder, and compare some of its outputs with those at export.

        A foreign folder, which emberpc did not write, has no outputs to compare with. Its model must give a text nearly
        the same output alone and in a batch.

        Args:
            name: the name under which the model is served.
            folder: the bundle or foreign folder.
            variant_name: name of the variant; empty: the first.
            options: options of a foreign model; see `emberpc.bundle.Stated`. A bundle takes none.
            encoders: encoders in use, which the model may share; None: the model gets its own.
            runtimes: decides on the engine and its precision; None: ONNX Runtime.
            fresh: whether to load the encoder even if an encoder with the same fingerprint and length limit is in use.
                Has no effect on a classifier with a head file.
            on_stage: called on this thread with the name of each stage as it begins.

        Raises:
            ModelLoadError: a file is missing, damaged or not supported; there is no such variant; the model does not
                run; the outputs differ from those at export, or, of a foreign folder, alone and in a batch; or an
                option is missing or wrong.
        """
        loading = _Loading(name, runtimes or _ONNX_RUNTIME)
        try:
            on_stage("checking the files")
            bundle = open_bundle(
                folder,
                options or {},
                lambda path: loading.session(path).graph,
                check_hashes=False,
                contents=loading.contents,
            )
            variant = bundle.manifest.variant(variant_name)
            loading.decide(bundle.manifest.files[variant.path].sha256, variant)
            loading.contents.read(bundle.model_path(variant))
            # Other threads hash the weights meanwhile, since hashing takes about as long as loading.
            with ThreadPoolExecutor(2, thread_name_prefix="hashes") as beside:
                hashes = beside.submit(bundle.check_hashes, loading.contents)
                on_stage("loading the weights")
                try:
                    model = cls._of(
                        name, folder, bundle, variant_name, options or {}, loading, encoders, beside, fresh=fresh
                    )
                except (BundleError, SessionError):
                    hashes.result()  # if a file has changed, that is the cause, and its error is raised
                    raise
                hashes.result()
            bundle.check_contents(loading.contents)
            on_stage("warming up")
            model._check(bundle)
            model._check_limits(bundle, loading.contents)
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
        """Load the files of a bundle, and return the model. The outputs of the model are not compared here.

        Args:
            name: the name under which the model is served.
            folder: the bundle or foreign folder.
            bundle: the manifest and the paths of the files.
            variant_name: name of the variant; empty: the first.
            options: options of a foreign model.
            loading: the files that were read so far; receives the others.
            encoders: encoders in use, which the model may share; None: the model gets its own.
            beside: computes the fingerprint on another thread.
            fresh: whether to load the encoder even if the model could share one. Has no effect on a model with a head.

        Raises:
            BundleError: there is no such variant; or a file is missing, damaged, outside of the folder or not
                supported.
            SessionError: the engine cannot load the ONNX file.
        """
        manifest = bundle.manifest
        variant = manifest.variant(variant_name)
        head, scope_vectors = bundle.head(), bundle.scope_vectors()

        path = bundle.model_path(variant)
        entry = manifest.files[variant.path]

        def load_encoder() -> Encoder:
            session = loading.session(path)
            interface = bundle.interface(session.graph, headless=head is not None)
            return Encoder(
                session,
                interface,
                manifest.pad_token_id,
                entry.sha256,
                loading.plan.batch_tokens,
                manifest.max_tokens,
            )

        # An encoder that gives logits is always loaded here. `Registry.put` may share it later.
        vectors = head is not None or manifest.task is Task.EMBEDDING
        shared = encoders if encoders is not None and vectors else Encoders()
        fresh = fresh and head is None
        # Raises BundleError if an external file of the ONNX file lies outside of the folder, before that file is read.
        bundle.external_files(variant.name, loading.contents)
        fingerprinting = beside.submit(
            bundle.fingerprint, variant.name, headless=head is not None, contents=loading.contents
        )
        if fresh or shared.is_empty:  # no encoder can be shared, so loading need not wait for the fingerprint
            try:
                loading.session(path)
            except SessionError:
                fingerprinting.result()  # an error of the file's contents says more
                raise
        plan = loading.plan
        fingerprint = plan.runtime.fingerprint(fingerprinting.result())
        encoder = shared.get(fingerprint, manifest.max_tokens, plan.runtime, load_encoder, fresh=fresh)
        if head is None and encoder.sha256 != entry.sha256:
            # The shared encoder was loaded from another file with the same fingerprint. This file must load as well.
            load_encoder()
        return cls(
            name=name,
            folder=folder,
            options=dict(options),
            plan=plan,
            manifest=manifest,
            variant=variant,
            tokenizer=_tokenizer(bundle, loading.contents),
            encoder=encoder,
            head=head,
            scope_vectors=scope_vectors,
            size_bytes=entry.size,
            loaded=datetime.now(timezone.utc),
            fingerprint=fingerprint,
            classifier_fingerprint=bundle.classifier_fingerprint(fingerprint, head, scope_vectors),
            legacy_fingerprint=bundle.legacy_fingerprint(variant.name) if plan.runtime.same_model else "",
        )

    def _check(self, bundle: Bundle) -> None:
        """Run some texts and compare the outputs with those at export; this also warms the model up.

        For a foreign folder, the outputs of a batch are compared with those of each text alone.

        Raises:
            ModelLoadError: the model does not run, or the outputs differ by more than the bound of the variant.
            BundleError: the output has a shape that cannot be served, or the file with the outputs at export is missing
                or damaged.
        """
        reference = None if bundle.foreign else bundle.reference()
        texts = PROBES if reference is None else reference.texts[:_REFERENCE_TEXTS]
        try:
            tokens = [text.ids for text in self.tokenizer.tokenize(texts, "", Truncation.END, items_of("texts"))]
            got = self.finish(self.encoder.run(tokens))
            if reference is None:
                expected = np.concatenate([self.encoder.run([ids]) for ids in tokens])
            else:
                expected = reference.vectors if reference.logits is None else reference.logits
        except BundleError:
            raise
        except Exception as error:  # the exceptions of the engines, and of the tokenizer, share no base class
            raise ModelLoadError(f"model {self.name!r}: {bundle.folder} loads but does not run") from error
        width = len(self.manifest.labels) or self.manifest.dimensions
        if got.shape[1] != width:
            output = self.encoder.interface.output
            raise BundleError(f"the output {output} has {got.shape[1]} values for a text, not {width}")
        bound = _FP32_BOUND if self.plan.runtime.precision == "fp32" else ENGINE_BOUNDS["bf16"]
        if _alike(got, expected[: len(tokens)], self.variant.bound or bound):
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

    def _check_limits(self, bundle: Bundle, contents: Contents) -> None:
        """Compare OpenVINO with ONNX Runtime for the longest text and the highest token id of a foreign folder.

        For a bundle, the export checked that the graph fits to tokenizer and length limit.

        Raises:
            ModelLoadError: the outputs differ, or the graph fails in ONNX Runtime.
            SessionError: ONNX Runtime cannot load the ONNX file.
        """
        runtime = self.plan.runtime
        if not bundle.foreign or runtime.engine == "onnxruntime":
            return
        encoder = self.encoder
        exact = Encoder(Runtime().open(encoder.path, contents), encoder.interface, encoder.pad_token_id)
        if fault := fault_at_the_limits(self.tokenizer, exact, encoder, runtime.precision):
            raise ModelLoadError(
                f"model {self.name!r}: {bundle.folder}: {fault}; serve the model with --engine onnxruntime, or state a "
                f"smaller limit with --model-option {self.name}.max_tokens=…"
            )


class _Loading:
    """The files and sessions of a model that is being loaded. The bytes of the files are freed with this object.

    `plan` is how the model is run. Before `decide`, it is the plan for an unknown ONNX file: foreign folders need a
    session before their manifest is inferred.
    """

    def __init__(self, name: str, runtimes: Runtimes) -> None:
        self.contents = Contents()
        self._name, self._runtimes = name, runtimes
        self.plan = runtimes.plan(name, "")
        self._sessions: dict[Path, Session] = {}

    def decide(self, sha256: str, variant: Variant) -> None:
        """Decide how the model is run, by the served variant and the SHA-256 (hex) of its ONNX file.

        Raises:
            BundleError: the variant was made for another engine than the settings state, or for one that is not
                installed; or the processor lacks instructions that the variant needs.
        """
        plan = self._runtimes.plan(self._name, sha256, variant.engine)
        fault = ""
        if variant.engine not in ("", *ENGINES):
            fault = f"was made for {variant.engine!r}, which this emberpc does not have; install a newer emberpc, or"
        elif variant.engine not in ("", plan.runtime.engine):
            fault = f"runs in {variant.engine} only; state --engine {self._name}={variant.engine}, or"
        elif variant.engine and not version_of(variant.engine):
            fault = f"needs the extra `{variant.engine}`; install 'emberpc[server,{variant.engine}]', or"
        elif variant.engine and not multiplies_int8():
            fault = "needs a processor with int8 dot products, such as VNNI;"
        if fault:
            raise BundleError(f"the variant {variant.name} {fault} serve another variant with --variant {self._name}=…")
        if plan.runtime != self.plan.runtime:
            self._sessions.clear()
        self.plan = plan

    def session(self, path: Path) -> Session:
        """Return the session of an ONNX file; the first call with a path loads it.

        Raises:
            SessionError: the file does not load.
        """
        if path not in self._sessions:
            self._sessions[path] = self.plan.runtime.open(path, self.contents)
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
