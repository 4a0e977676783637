"""Files of the stages: those that a full disk leaves, and those that an earlier version wrote."""

import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from onnx_spdy.pipeline.artifact import ArtifactError, read_json, write_json, write_tensors
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.report import QUESTION, Report


@contextmanager
def no_room():
    """No file of this process grows beyond 16 KiB, pytest's own output included: so no longer than it must."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_tensors(path, {"weight": torch.zeros(1 << 14)}),
        lambda path: write_json(path, "test", 1, {"text": "x" * (1 << 16)}),
    ],
    ids=["tensors", "json"],
)
def test_a_file_without_room_is_named_and_leaves_nothing(write, tmp_path):
    with pytest.raises(OSError, match="too large") as caught, no_room():
        write(tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_paths_may_be_text(tmp_path):
    write_json(str(tmp_path / "sub" / "file.json"), "test", 1, {"a": 1})
    assert read_json(str(tmp_path / "sub" / "file.json"), "test", 1)["a"] == 1
    with pytest.raises(ArtifactError, match="can't be read"):
        Profile.load(str(tmp_path / "nothing.json"))


def question(**changed):
    return {name: name for name in QUESTION} | changed


def attempt(aim, measured):
    return {"aim_speedup": aim, "predicted_speedup": aim, "loss": 1.0, "measured_speedup": measured}


def test_a_report_keeps_the_attempts_of_an_earlier_call_for_the_same_question():
    earlier = Report({**question(), "attempts": [attempt(2.0, 1.8), attempt(2.2, 2.1)]})
    now = Report({**question(), "attempts": [attempt(2.2, 2.0)]})
    assert now.after(earlier).content["attempts"] == [attempt(2.0, 1.8), attempt(2.2, 2.0)]
    assert now.after(None) == now
    for name in QUESTION:
        other = Report({**question(**{name: "other"}), "attempts": [attempt(2.0, 1.8)]})
        assert now.after(other) == now


def test_a_file_of_an_earlier_version_is_told_from_one_that_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"format": "onnx_spdy.report", "version": 1, "runtime": "fake"}')
    with pytest.raises(ArtifactError, match="has no checksum: an earlier version wrote it"):
        read_json(path, "report", 1)
