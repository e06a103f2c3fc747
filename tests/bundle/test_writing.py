"""A bundle is written whole or not at all, even if the writing process fails or is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from emberpc.bundle import BundleError, Manifest, finish_bundle, read_bundle, staged_folder
from emberpc.bundle.writing import check_target


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_target_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "bundle"
    with staged_folder(target) as staging:
        assert not target.exists()
        (staging / "file").write_text("x")
    assert (target / "file").read_text() == "x"
    assert entries(target.parent) == {"bundle"}
    assert target.stat().st_mode & 0o777 == 0o755


def write_until(error: BaseException, target: Path, *, overwrite: bool = False) -> None:
    """Begin to write, and raise an error before the block ends."""
    with staged_folder(target, overwrite=overwrite) as staging:
        (staging / "file").write_text("x")
        (target.parent / "beside").mkdir()
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_no_target_and_no_parent_folders(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "deep" / "er" / "bundle"
    with pytest.raises(error), staged_folder(target):
        raise error
    assert entries(tmp_path) == set()


def test_parent_folders_in_use_by_others_are_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"):
        write_until(ValueError("stop"), tmp_path / "models" / "mine")
    assert entries(tmp_path / "models") == {"beside"}


def test_an_exception_in_the_block_keeps_the_old_bundle(folder: Path) -> None:
    before = read_bundle(folder).manifest
    with pytest.raises(KeyboardInterrupt):
        write_until(KeyboardInterrupt(), folder, overwrite=True)
    assert read_bundle(folder).manifest == before
    assert entries(folder.parent) == {folder.name, "beside"}


def test_an_exception_during_replacement_keeps_the_old_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_bundle(folder).manifest
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if Path(target) == folder and self.name != "bundle":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_folder(folder, overwrite=True):
        pass
    monkeypatch.undo()
    assert read_bundle(folder).manifest == before
    assert entries(folder.parent) == {folder.name}


def test_a_bundle_is_replaced_only_with_overwrite(folder: Path) -> None:
    with pytest.raises(BundleError, match="replace it with --overwrite"), staged_folder(folder):
        pass
    with staged_folder(folder, overwrite=True) as staging:
        (staging / "new").write_text("x")
    assert entries(folder) == {"new"}
    assert entries(folder.parent) == {folder.name}


def test_a_folder_that_is_not_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("dear")
    with pytest.raises(BundleError, match="not a bundle"), staged_folder(tmp_path / "home", overwrite=True):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="not a folder"), staged_folder(tmp_path / "file", overwrite=True):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "home")
    with pytest.raises(BundleError, match="not a folder"), staged_folder(tmp_path / "link", overwrite=True):
        pass
    assert (tmp_path / "home" / "letters").read_text() == "dear"


def test_an_empty_folder_may_be_the_target(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty") as staging:
        (staging / "file").write_text("x")
    assert entries(tmp_path / "empty") == {"file"}


def test_a_target_below_a_file_is_refused_with_a_bundle_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="cannot be created"), staged_folder(tmp_path / "file" / "bundle"):
        pass


def test_a_finished_bundle_lists_every_file_but_the_manifest(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "onnx").mkdir()
    for name in ("onnx/model.onnx", "tokenizer.json", "onnx/emberpc.json"):
        (tmp_path / name).write_text(name)
    written = finish_bundle(tmp_path, manifest)
    assert set(written.files) == {"onnx/model.onnx", "tokenizer.json", "onnx/emberpc.json"}
    assert read_bundle(tmp_path).manifest == written


_KILLED = """
import os, signal, sys
import signal
import subprocess
import sys
from pathlib import Path
from emberpc.bundle import staged_folder
target = Path(sys.argv[1])
rename = Path.rename
def die(self, to):
    if self.name.endswith(".emberpc-partial"):  # it would now become the target
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, to)
Path.rename = die
with staged_folder(target, overwrite=True) as staging:
    (staging / "file").write_text("x")
"""


def killed(target: Path) -> None:
    """Write to a target in a process that is killed just before it moves the bundle to the target."""
    run = subprocess.run([sys.executable, "-c", _KILLED, str(target)], check=False, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_files_of_a_killed_process_are_removed_by_the_next_write(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    killed(target)
    (left,) = entries(tmp_path)
    others = {".bundle-mine", f"{left.replace('bundle', 'bundle-2')}", ".bundle-new-x"}
    for name in others:
        (tmp_path / name).mkdir()
    with staged_folder(target):
        assert not (tmp_path / left).exists()
    assert entries(tmp_path) == {"bundle", *others}


def test_a_bundle_that_a_killed_process_had_moved_away_is_put_back(folder: Path) -> None:
    before = read_bundle(folder).manifest
    killed(folder)
    assert not folder.exists()
    with pytest.raises(BundleError, match="holds a bundle already"), staged_folder(folder):
        pass
    assert read_bundle(folder).manifest == before
    assert entries(folder.parent) == {folder.name}


def test_files_that_another_process_is_writing_are_kept(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "bundle") as first:
        (first / "file").write_text("first")
        code = "import sys; from emberpc.bundle import staged_folder\nwith staged_folder(sys.argv[1]): pass"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "bundle")], check=True)
        assert (first / "file").read_text() == "first"
    assert entries(tmp_path) == {"bundle"}


def test_a_target_whose_name_is_too_long_is_refused_with_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot be used \(File name too long\); choose another place"):
        check_target(tmp_path / ("x" * 300))
