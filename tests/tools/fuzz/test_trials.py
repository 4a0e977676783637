"""A handful of each trial on every run; hundreds with `python -m onnx_spdy.tools.fuzz`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.tools.fuzz import child, kept, wrong
from onnx_spdy.tools.fuzz.child import Ended
from onnx_spdy.tools.fuzz.graphs import SENTENCES, example
from onnx_spdy.tools.fuzz.odd import CHANGES, odd
from onnx_spdy.tools.fuzz.setting import TINY, cleared


@pytest.mark.slow
@pytest.mark.parametrize(("trial", "count"), [("run", 6), ("kept", 4), ("kills", 1), ("wrong", 8), ("pairs", 1)])
def test_none_of_them_makes_trouble(trial: str, count: int) -> None:
    """In a process of its own, which forks: this one may have threads."""
    command = [sys.executable, "-m", "onnx_spdy.tools.fuzz", trial, "--count", str(count), "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{trial}: {count} trials from 0 on, seed 7" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("end", "trouble"),
    [
        (Ended(0, "", ""), None),
        (Ended(1, "", "measure: 3 done in 0.1 s\nINFO: loss\nwarning: no kernels\nerror: no such file\n"), None),
        (Ended(1, "", "error: one\nerror: two\n"), "several lines"),
        (Ended(1, "", "INFO: loss\n"), "silent failure"),
        (Ended(2, "", "Usage"), None),
        (Ended(3, "", ""), "exit code 3"),
        (Ended(child.TRACEBACK, "", ""), "traceback"),
        (Ended(0, "", "Traceback (most recent call last):"), "traceback"),
        (Ended(-6, "", ""), "crash (SIGABRT)"),
        (Ended(-9, "", "", overdue=True), "hang"),
    ],
)
def test_an_end_that_no_user_should_see_is_noticed(end: Ended, trouble: str | None) -> None:
    assert end.trouble == trouble


def test_a_bug_a_crash_and_a_hang_are_noticed(tmp_path: Path) -> None:
    def bug() -> int:
        raise KeyError("a bug")

    def hang() -> int:
        while True:
            pass

    for number, (work, trouble) in enumerate([(bug, "traceback"), (hang, "hang"), (lambda: 0, None)]):
        output = tmp_path / str(number)
        found = child.wait(child.start(work, output), output, seconds=0.5)
        assert found.trouble == trouble, found


def test_the_same_seed_makes_the_same_wrong_calls() -> None:
    first, again, other = (wrong.calls(seed) for seed in (3, 3, 4))
    assert first == again != other
    assert sorted(first) == sorted(other)
    assert {call[0] for call in first} >= {*wrong.CALLS}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_odd_networks_differ_from_the_example(change) -> None:
    for seed in range(20):
        model = example(SENTENCES, np.random.default_rng(0))
        before = model.SerializeToString()
        change(model.graph, np.random.default_rng(seed))
        if model.SerializeToString() != before:
            return
    raise AssertionError("nothing changed")


def test_an_odd_network_is_a_copy() -> None:
    model = example(TINY, np.random.default_rng(0))
    before = model.SerializeToString()
    files, what = odd(model, np.random.default_rng(1))
    assert model.SerializeToString() == before != files.model
    assert onnx.load_from_string(files.model).graph.name == "tiny" and what


def test_damage_to_a_kept_file_changes_it(tmp_path: Path) -> None:
    """Each kind of file, and each is told what was done."""
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "a.json").write_text(json.dumps({"format": "onnx_spdy.x", "version": 1, "a": [1, 2.5, "b"]}))
    onnx.save(example(TINY, np.random.default_rng(0)), tmp_path / "sound" / "a.onnx")
    (tmp_path / "other").mkdir()
    for name in ("a.json", "a.onnx"):
        (tmp_path / "other" / name).write_text("another run's")
        whole = (tmp_path / "sound" / name).read_bytes()
        changed = 0
        for seed in range(30):
            path = tmp_path / str(seed) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(whole)
            what, _ = kept.damage(path, name, np.random.default_rng(seed), lambda number: tmp_path / "other")
            changed += not path.is_file() or path.read_bytes() != whole
            assert what
        assert changed > 20  # a bit of a weight may be what it was


@pytest.mark.slow
def test_other_results_are_noticed(tmp_path: Path) -> None:
    """A run with another seed leaves other files, the same call the same ones."""
    code = f"""
from pathlib import Path
from onnx_spdy.tools.fuzz import child, kills, pairs
from onnx_spdy.tools.fuzz.setting import OUT, RUN, differing, make, prune, results
child.import_everything()
folder = Path({str(tmp_path)!r})
for name, more in (("a", ()), ("b", ()), ("c", ("--pruner", "magnitude"))):
    prune(make(folder / name), (*RUN, *more))
a, b, c = (results(folder / name / OUT) for name in "abc")
print(differing(a, b), differing(a, c))
done = child.Ended(0, "", "")
print(kills.trouble_of(done, folder / "b", a), "/", kills.trouble_of(done, folder / "c", a))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    same, trouble = done.stdout.splitlines()
    assert same.startswith("[] [") and "model.onnx" in same and "report.json" in same
    assert trouble.startswith("None / other bits in ") and "model.onnx" in trouble


@pytest.mark.parametrize("trouble", [None, "traceback"])
def test_a_trial_is_kept_where_it_made_trouble(trouble: str | None, tmp_path: Path) -> None:
    case, keep = tmp_path / "case", tmp_path / "keep"
    case.mkdir()
    (case / "net.onnx").write_text("a network")
    (case / "link").symlink_to("nowhere")
    outcome = child.Outcome(trouble, "", "")
    assert cleared(outcome, case, 7, keep) is outcome
    assert not case.exists()
    assert keep.exists() == (trouble is not None)
    assert trouble is None or (
        (keep / "7" / "net.onnx").read_text() == "a network" and (keep / "7" / "link").is_symlink()
    )
