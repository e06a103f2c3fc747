"""Read a bundle: check its files against its manifest, and compute the fingerprints of its model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from emberpc.bundle.contents import Contents
from emberpc.bundle.errors import BundleError, UnstatedError
from emberpc.bundle.hashing import sha256_of_part
from emberpc.bundle.head import HEAD_NAME, Head
from emberpc.bundle.interface import Graph, Interface, find_inputs
from emberpc.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest, Task, Variant
from emberpc.bundle.onnx_file import external_files, output_digest
from emberpc.bundle.reference import Reference
from emberpc.bundle.scope import SCOPE_NAME, RejectionScore, ScopeVectors

TOKENIZER_NAME = "tokenizer.json"
#: Limit of a manifest in bytes: a larger file is refused before it is read into memory. Most manifests have some
#: kilobytes; many labels or files need more.
MAX_MANIFEST_BYTES = 16 * 2**20

_REEXPORT = "copy the bundle again or export the model again"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest was read, or a foreign folder whose manifest was inferred from its files.

    `read_bundle` checks that each file of a bundle is there and has the manifest's size. `check_hashes` compares the
    hashes.

    `foreign` is the interface of the graph of a foreign folder (see `emberpc.bundle.foreign`); None for a bundle.
    `legacy_covers_weights` is False for a foreign folder if its fingerprint of the old scheme leaves out a file with
    weights, or belongs to other vectors than the model returns today; `legacy_fingerprint` is empty then.
    """

    folder: Path
    manifest: Manifest
    foreign: Interface | None = None
    legacy_covers_weights: bool = True

    def model_path(self, variant: Variant) -> Path:
        """Return the path of a variant's ONNX file."""
        return self.folder / variant.path

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer's file, which has the format of the `tokenizers` library."""
        return self.folder / TOKENIZER_NAME

    def interface(self, graph: Graph, *, headless: bool = False) -> Interface:
        """Return how to call the graph of a variant. For a foreign folder, `foreign` is returned.

        Args:
            graph: the graph's inputs and outputs; not used for a foreign folder.
            headless: for a classifier in a bundle, whether to read the vector that the head takes instead of the
                logits. No effect on other models.

        Raises:
            BundleError: a bundle's graph lacks the output to read, or its inputs are not those of a bundle's graph:
                token ids and, optionally, mask and token types, all int64 or all int32.
        """
        if self.foreign is not None:
            return self.foreign
        output = self.output(headless=headless)
        outputs = [tensor.name for tensor in graph.outputs]
        if output not in outputs:
            raise BundleError(f"the graph's outputs are {', '.join(outputs)}; it must have {output!r}; {_REEXPORT}")
        try:
            return Interface(find_inputs(graph), output)
        except UnstatedError as error:  # a bundle must be complete, so no model option is offered
            raise BundleError(f"{error}; {_REEXPORT}") from error

    def output(self, *, headless: bool = False) -> str:
        """Return the name of the graph's output to read: `logits` or `sentence_embedding`, or as `foreign` states.

        Args:
            headless: for a classifier in a bundle, whether to read the vector that the head takes instead of the
                logits. No effect on other models.
        """
        if self.foreign is not None:
            return self.foreign.output
        logits = self.manifest.task is Task.CLASSIFICATION and not headless
        return "logits" if logits else "sentence_embedding"

    def external_files(self, variant: str = "", contents: Contents | None = None) -> tuple[str, ...]:
        """Return the external weight files of a variant's ONNX file, as paths relative to the folder, sorted.

        Args:
            variant: name of the variant; empty: the first one.
            contents: reads the ONNX file; None: it is read from disk.

        Raises:
            BundleError: there is no such variant; or the ONNX file cannot be read, or a file that it names is missing,
                lies outside the folder or is not listed in the manifest.
        """
        found = external_files(self.folder, self.manifest.variant(variant).path, contents)
        for name in found:
            if name not in self.manifest.files:
                raise BundleError(f"{self.folder / name} holds weights and is not in the manifest; {_REEXPORT}")
        return found

    def fingerprint(self, variant: str = "", *, headless: bool = False, contents: Contents | None = None) -> str:
        """Return a SHA-256 (hex) of everything that decides the output to read, except `max_tokens`.

        The fingerprint covers the part of the graph that the output depends on, its weights, the tokenizer, the
        manifest's pooling, prompts, dimensions and normalization, and the roles of a foreign graph's inputs. Names and
        hashes in the manifest do not count.

        Vectors of two models with equal fingerprints may be in one collection. Their ONNX files may differ elsewhere:
        with `headless`, a classifier with a head file has the fingerprint of its encoder, exported as an embedding
        model with the same settings.

        Args:
            variant: name of the variant; empty: the first one.
            headless: for a classifier in a bundle, whether the vector that the head takes counts instead of the logits.
                No effect on other models.
            contents: reads the files; None: they are read from disk now.

        Raises:
            BundleError: there is no such variant; a file cannot be read; a file with weights is missing, lies outside
                the folder, is too short or is not listed in the manifest; or `contents` stopped since the loading of
                the model was cancelled.
        """
        manifest, model = self.manifest, self.manifest.variant(variant).path
        self.external_files(variant, contents)  # raises if the manifest lacks one
        parts = {
            "scheme": 2,
            "output": output_digest(self.folder, model, self.output(headless=headless), contents),
            "tokenizer": sha256_of(self.tokenizer_path, contents),
            "pooling": manifest.pooling,
            "prompts": dataclasses.asdict(manifest.prompts),
            "dimensions": manifest.dimensions,
            "normalize": manifest.normalize,
            "inputs": self.foreign.inputs.roles() if self.foreign else {},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def classifier_fingerprint(
        self, fingerprint: str, head: Head | None, scope_vectors: ScopeVectors | None = None
    ) -> str:
        """Return a SHA-256 (hex) of everything that decides a classifier's labels; empty if the model is no classifier.

        Two classifiers with head files on the same encoder have equal results of `Bundle.fingerprint` with `headless`,
        since their vectors are equal. The result of this method also covers the head, the labels with their order, the
        decision rule with the vectors of its rejection score, and `max_tokens`.

        Args:
            fingerprint: the result of `Bundle.fingerprint`, with `headless` if there is a head file. Without a head
                file, `fingerprint` covers the weights of the head, which are in the graph.
            head: the head; None if the bundle has no head file.
            scope_vectors: the vectors of the rejection score; None if it needs none.
        """
        manifest = self.manifest
        if manifest.task is not Task.CLASSIFICATION:
            return ""
        parts = {
            "scheme": 1,
            "encoder": fingerprint,
            "labels": manifest.labels,
            "decision_rule": _rule_parts(manifest),
            "max_tokens": manifest.max_tokens,
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        arrays = [] if head is None else [head.weights, head.bias]
        for array in arrays if scope_vectors is None else [*arrays, scope_vectors.vectors]:
            digest.update(np.ascontiguousarray(array, dtype="<f4").data)
        return digest.hexdigest()

    def legacy_fingerprint(self, variant: str = "") -> str:
        """Return a variant's fingerprint (hex) of the old scheme; empty if `legacy_covers_weights` is False.

        Collections from before the new scheme store it. `Manifest.legacy_fingerprint` computes it from the manifest.

        Args:
            variant: name of the variant; empty: the first one.

        Raises:
            BundleError: the bundle has no such variant.
        """
        return self.manifest.legacy_fingerprint(variant) if self.legacy_covers_weights else ""

    def head(self) -> Head | None:
        """Read a classifier's head from its file; return None for a foreign folder or a manifest without a head file.

        Raises:
            BundleError: the file is missing or damaged, or does not fit the manifest's dimensions and labels.
        """
        if self.foreign is not None or HEAD_NAME not in self.manifest.files:
            return None
        return Head.read(self.folder, self.manifest.dimensions, len(self.manifest.labels))

    def scope_vectors(self) -> ScopeVectors | None:
        """Read the vectors that the rejection score needs from their file; return None if it needs none.

        Raises:
            BundleError: the file is missing or damaged, or does not fit the manifest's dimensions.
        """
        if not self.manifest.rejection_score.needs_vectors:
            return None
        return ScopeVectors.read(self.folder, self.manifest.dimensions)

    def reference(self) -> Reference:
        """Read the texts and outputs of `reference.npz`. Call it for a bundle only: a foreign folder has no such file.

        Raises:
            BundleError: the file is missing or damaged; see `Reference.read`.
        """
        return Reference.read(self.folder)

    def check_hashes(self, contents: Contents | None = None) -> None:
        """Check each file of a bundle with `check_file`, its SHA-256 included; do nothing for a foreign folder.

        Args:
            contents: contents of files that were read earlier; other files are read from disk. None: all are.

        Raises:
            BundleError: as for `check_file`.
        """
        for name in self.manifest.files if self.foreign is None else ():
            check_file(self.folder, self.manifest, name, contents=contents)

    def check_contents(self, contents: Contents) -> None:
        """Compare the SHA-256 of each of the manifest's files that `contents` has read with the manifest.

        `check_hashes` compares the file on disk if `contents` has not read it yet. Call this method after the loading,
        since a file may have been written between `check_hashes` and the reading.

        Raises:
            BundleError: a file's content, as it was read, differs from the manifest; or `contents` stopped since the
                loading of the model was cancelled.
        """
        for name, entry in self.manifest.files.items():
            path = self.folder / name
            if contents.holds(path) and contents.sha256(path) != entry.sha256:
                raise BundleError(f"{path} was written while it was loaded; load it again")


def _rule_parts(manifest: Manifest) -> dict[str, object]:
    """Return the parts of a classifier's fingerprint that are its decision rule.

    The fingerprint of a classifier with the score `max_logit` must stay the same, so its parts keep their names.
    """
    parts: dict[str, object] = {
        "temperature": manifest.temperature,
        "thresholds": manifest.thresholds,
        "rejection_logit": manifest.rejection_logit,
        "multi_label": manifest.multi_label,
    }
    if manifest.rejection_score is not RejectionScore.MAX_LOGIT:
        parts |= {"score": manifest.rejection_score.value, "rejection_threshold": manifest.rejection_threshold}
    return parts


def read_bundle(folder: Path | str, *, check_hashes: bool = True) -> Bundle:
    """Read the manifest of a bundle, and check that each file that the manifest lists is there.

    Args:
        folder: the bundle's folder.
        check_hashes: whether to compare the SHA-256 of each file with the manifest, and not only its size.

    Raises:
        BundleError: the manifest is missing or invalid (see `read_manifest`), or a file is missing or wrong (see
            `check_file`).
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in manifest.files:
        check_file(folder, manifest, name, check_hashes=False)
    bundle = Bundle(folder, manifest)
    if check_hashes:
        bundle.check_hashes()
    return bundle


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a bundle; no other file is read or checked.

    Raises:
        BundleError: the folder or the manifest is missing; or the manifest is a symbolic link, is larger than
            `MAX_MANIFEST_BYTES`, cannot be read, is invalid, or lacks the tokenizer, the ONNX file of a variant or a
            file of the rejection score in its list of files.
    """
    if not folder.is_dir():
        raise BundleError(f"{folder}: there is no such folder")
    path = folder / MANIFEST_NAME
    if path.is_symlink():
        raise BundleError(f"{path} is a symbolic link; a bundle holds plain files only")
    if not path.is_file():
        raise BundleError(
            f"{folder} has no {MANIFEST_NAME}, so it is no bundle; "
            "make one with `emberpc export embedding SOURCE -o DIR`"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read as UTF-8; {_REEXPORT}") from error
    manifest = Manifest.from_json(text)
    scope = (HEAD_NAME, SCOPE_NAME) if manifest.rejection_score.needs_vectors else ()
    for needed in (TOKENIZER_NAME, *(variant.path for variant in manifest.variants), *scope):
        if needed not in manifest.files:
            raise BundleError(f"{path}: {needed} is not among its files; {_REEXPORT}")
    return manifest


def check_file(
    folder: Path, manifest: Manifest, name: str, *, check_hashes: bool = True, contents: Contents | None = None
) -> None:
    """Check the path and the size of one of the files that the manifest lists, and its SHA-256 if asked.

    Args:
        folder: the bundle.
        manifest: the bundle's manifest.
        name: the file's path, a key of `manifest.files`.
        check_hashes: whether to compare the SHA-256, too.
        contents: contents of files that were read earlier. If they include the file, their SHA-256 is compared, else
            that of the file on disk. The size is always that of the file on disk.

    Raises:
        BundleError: the path leads out of the folder or through a symbolic link; the file is missing, differs from the
            manifest or cannot be read; or `contents` stopped since the loading of the model was cancelled.
    """
    entry: FileEntry = manifest.files[name]
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise BundleError(f"{folder / MANIFEST_NAME}: the path {name!r} leads out of the bundle")
    path = folder / name
    # The last parent is `.`, the bundle's folder: that folder may be a link.
    if any((folder / part).is_symlink() for part in (pure, *pure.parents[:-1])):
        raise BundleError(f"{path} is or lies behind a symbolic link; a bundle holds plain files only")
    if not path.is_file():
        raise BundleError(f"{path} is missing; {_REEXPORT}")
    if path.stat().st_size != entry.size:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry.size}; {_REEXPORT}")
    read = contents if contents is not None and contents.holds(path) else None
    if check_hashes and sha256_of(path, read) != entry.sha256:
        raise BundleError(f"{path} is not the file that was exported (its SHA-256 differs); {_REEXPORT}")


def sha256_of(path: Path, contents: Contents | None = None) -> str:
    """Return the SHA-256 (hex) of a file.

    Args:
        path: the file.
        contents: reads the file, or has read it; None: the file is read from disk in chunks.

    Raises:
        BundleError: the file cannot be read, or `contents` stopped since the loading of the model was cancelled.
    """
    return sha256_of_part(path).hex() if contents is None else contents.sha256(path)
