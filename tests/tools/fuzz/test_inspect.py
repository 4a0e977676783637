"""A small share of the damaged files on every run; thousands with `python -m onnx_spdy.tools.fuzz inspect`."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.tools.fuzz.damage import DATA_FILE, Files, damaged
from onnx_spdy.tools.fuzz.graphs import examples, with_external_data
from onnx_spdy.tools.fuzz.inspect import inspected


def test_damaged_files_end_in_one_line():
    """In a process of its own, which forks: this one may have threads."""
    command = [sys.executable, "-m", "onnx_spdy.tools.fuzz", "inspect", "--count", "40", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused in one line" in done.stdout and "accepted" in done.stdout


def test_the_same_seed_makes_the_same_files():
    model = examples()[0]
    first, again, other = (damaged(model, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_trouble_is_noticed(tmp_path, monkeypatch):
    """A traceback and a written file inside `inspect` are found: the counts can be other than 0."""
    import onnx_spdy.tools.cli as cli

    def broken(arguments):
        raise KeyError("a bug")

    def writing(arguments):
        (tmp_path / "elsewhere").write_text("x")

    for number, (main, trouble) in enumerate([(broken, "traceback"), (writing, "wrote a file")]):
        monkeypatch.setattr(cli, "main", main)
        assert inspected(Files(b""), tmp_path / str(number)).trouble == trouble


def test_huge_inputs_are_refused_before_anything_is_made_of_them(tmp_path):
    weight = numpy_helper.from_array(np.ones((32, 3, 1, 1), np.float32), "w")
    value = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 2**20, 2**20]) for n, c in (("x", 3), ("y", 32))
    ]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", value[:1], value[1:], [weight])
    outcome = inspected(Files(helper.make_model(graph).SerializeToString()), tmp_path / "case")
    assert outcome.trouble is None and not outcome.accepted
    assert "'x'" in outcome.text and "GiB" in outcome.text


@pytest.mark.parametrize("number", range(len(examples())))
@pytest.mark.parametrize("external", [False, True])
def test_the_examples_themselves_are_accepted(tmp_path, number, external):
    model = examples()[number]
    onnx.checker.check_model(model)
    files = Files(model.SerializeToString())
    if external:
        outside, data = with_external_data(model, DATA_FILE)
        files = Files(outside.SerializeToString(), data)
    outcome = inspected(files, tmp_path / "case")
    assert outcome.accepted and outcome.trouble is None, outcome.text
