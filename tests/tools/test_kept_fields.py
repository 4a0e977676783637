"""Kept files whose fields are missing or of another type, though their checksum fits: one error that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onnx_spdy.pipeline.artifact import CHECKSUM, ArtifactError, write_json
from onnx_spdy.pipeline.database.layer_database import open_database
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.search.state import SearchState
from onnx_spdy.tools.cli import main
from onnx_spdy.tools.fuzz.setting import OUT, RUN, make

VALUES = (None, "text", -1, 2**70, [], [None], {}, {"x": 1}, [[1, "x"]])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("kept"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as caught:
            main([*RUN, "--search-images", "500", "--finetune", "none"])
    assert not caught.value.code
    return folder / OUT


def changed(document: Any) -> Iterator[tuple[str, Any]]:
    """Each field of the first two levels (of lists the first entry) dropped, or another value in its place."""
    for key in [*document]:
        for where in ([document], [document, key]):
            place = document if len(where) == 1 else document[key]
            if isinstance(place, dict):
                names: list[Any] = [key] if len(where) == 1 else [*place]
            elif isinstance(place, list) and place and len(where) == 2:
                names = [0]
            else:
                continue
            for name in names:
                before = place[name]
                for value in VALUES:
                    place[name] = value
                    yield f"{key}/{name} is {value!r}", document
                place[name] = before
                if isinstance(place, dict):
                    del place[name]
                    yield f"{key}/{name} dropped", document
                    place[name] = before


READERS: dict[str, Callable[[Path, Any], Any]] = {
    "latency.json": lambda path, sound: LatencyTable.load(path).highest_speedup,
    "profile.json": lambda path, sound: Profile.load(path).loss > 0,
    "search.json": lambda path, sound: SearchState(path, sound["question"]),
    "database/index.json": lambda path, sound: open_database(path.parent).verify(),
}


@pytest.mark.parametrize("name", READERS)
def test_it_is_read_or_refused(name: str, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out" / name
    sound = json.loads(path.read_text())
    kind, version = sound.pop("format").removeprefix("onnx_spdy."), sound.pop("version")
    del sound[CHECKSUM]
    refused = 0
    for what, document in changed(json.loads(json.dumps(sound))):
        write_json(path, kind, version, document)
        try:
            READERS[name](path, sound)
        except ArtifactError as exc:
            refused += 1
            assert path.name in str(exc) or "safetensors" in str(exc)
            assert "\n" not in str(exc)
        except Exception as exc:
            raise AssertionError(f"{name}: {what}: {exc!r}") from exc
    assert refused > 20


def test_a_report_is_shown_or_refused(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out" / "report.json"
    sound = json.loads(path.read_text())
    version = sound.pop("version")
    del sound["format"], sound[CHECKSUM]
    codes = []
    for number, (what, document) in enumerate(changed(sound)):
        if number % 23:
            continue
        write_json(path, "report", version, document)
        with pytest.raises(SystemExit) as caught:
            main(["report", str(tmp_path / "out")])
        codes.append(int(caught.value.code or 0))
        printed = capsys.readouterr()
        assert codes[-1] in (0, 1) and printed.err.count("\n") == codes[-1], (what, printed.err)
    assert {*codes} == {0, 1}
