"""What is left of processes that were killed is removed, and never what another one uses."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from onnx_spdy.pipeline.artifact import locked
from onnx_spdy.runtimes.atomic import UNFINISHED, WORK, WorkFolder, replacing

WAITING = """
import sys
from pathlib import Path
from onnx_spdy.runtimes.atomic import WorkFolder, replacing
with WorkFolder() as folder, replacing(Path(sys.argv[1])) as temporary:
    print(folder, temporary, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def other(tmp_path: Path, temporary_folder: Path):
    """A process that works in a folder and writes a file, and the paths of both."""
    command = [sys.executable, "-c", WAITING, str(tmp_path / "sub" / "file")]
    environment = {**os.environ, "TMPDIR": str(temporary_folder)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as one:
        assert one.stdout
        yield one, *map(Path, one.stdout.readline().split())
        one.kill()


def make_both_again(tmp_path: Path) -> None:
    with WorkFolder():
        pass
    with locked(tmp_path / "sub"), replacing(tmp_path / "sub" / "file") as path:
        path.write_text("new")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, other):
    process, folder, file = other
    process.kill()
    process.wait()
    assert folder.is_dir() and file.is_file()
    make_both_again(tmp_path)
    assert not folder.exists() and not file.exists()


def test_what_a_running_process_uses_stays(tmp_path, other):
    _, folder, file = other
    make_both_again(tmp_path)
    assert folder.is_dir() and file.is_file()


def test_what_a_process_uses_whose_number_is_unknown_here_stays(tmp_path, other, monkeypatch):
    """One in another container, say."""
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    test_what_a_running_process_uses_stays(tmp_path, other)


def test_other_files_stay(tmp_path, temporary_folder):
    strangers = [temporary_folder / f"{WORK}notes", tmp_path / f".file{UNFINISHED}", tmp_path / ".file.bak"]
    for one in strangers:
        one.write_text("mine")
    with locked(tmp_path), WorkFolder(), replacing(tmp_path / "file"):
        pass
    assert all(one.exists() for one in strangers)


def test_a_link_in_the_place_of_what_was_left_is_not_followed(tmp_path, temporary_folder):
    (tmp_path / "precious").mkdir()
    (temporary_folder / f"{WORK}4194305-abc").symlink_to(tmp_path / "precious")
    with WorkFolder():
        pass
    assert (tmp_path / "precious").is_dir()


def test_an_error_without_a_path_gets_that_of_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "file")
    assert not [*tmp_path.iterdir()]


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError) as caught, replacing(tmp_path / "file"):
        pytest.fail("not reached")
    assert caught.value.filename == str(tmp_path / "file")


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "folder").write_text("")
    for use in (locked(tmp_path / "folder"), replacing(tmp_path / "folder" / "file")):
        with pytest.raises(NotADirectoryError, match="is a file") as caught, use:
            pytest.fail("not reached")
        assert caught.value.filename == str(tmp_path / "folder")
