"""What is settled before a run: the fastest runtime, and the target against the best dense alternative."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline import aim
from onnx_spdy.pipeline.aim import AimError, against_best, fastest_runtime, measure_dense
from onnx_spdy.pipeline.alternatives import DENSE, Alternative, Alternatives, Candidate
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.progress import Watch
from onnx_spdy.pipeline.quantised.make import Quantised
from onnx_spdy.pipeline.run import keep_dense
from onnx_spdy.runtimes import Environment, Measurement, open_runtime


def dense(spec: str, milliseconds: float, metric: float | None = None, name: str | None = None) -> Alternative:
    engine, _, precision = (name or spec).replace(" ", ":").partition(":")
    environment = Environment(engine, "1", precision or "fp32", "cpu", "avx512", 2, 2, 1, "host")
    candidate = Candidate(DENSE, name or spec.replace(":", " "), spec, Path("dense.onnx"))
    return Alternative(candidate, Measurement((1e-3 * milliseconds,) * 6), environment, None, metric)


FOUND = Alternatives(
    (
        dense("deepsparse", 21.5, 0.85), dense("onnxruntime", 13.4, 0.85), dense("openvino:bf16", 6.3, 0.849),
        dense("openvino:fp32", 4.1, 0.848, "openvino int8"), dense("onnxruntime", 2.0, 0.6, "onnxruntime int8"),
    ),
    {},
)  # fmt: skip


def test_the_fastest_runtime_is_one_that_gains_by_the_pattern():
    assert fastest_runtime(FOUND, levels_for("channels")) == "openvino:bf16"
    assert fastest_runtime(FOUND, levels_for("unstructured")) == "deepsparse"
    assert fastest_runtime(FOUND, levels_for("block4")) == "deepsparse"


def test_where_no_runtime_has_kernels_it_is_said_in_one_line():
    without = Alternatives(FOUND.measured[1:3], {"deepsparse": "it is not installed"})
    with pytest.raises(
        AimError, match=r"kernels for unstructured.*deepsparse: it is not installed.*--pattern channels"
    ):
        fastest_runtime(without, levels_for("unstructured"))


def test_a_target_against_the_best_dense_alternative_is_one_against_dense_in_the_same_runtime():
    with open_runtime("deepsparse") as runtime:
        asked = against_best(FOUND, runtime)
    assert asked.best.name == "openvino int8"  # the faster one loses too much
    assert asked.of_same == pytest.approx(21.5 / 4.1)
    assert str(asked) == (
        "1x as fast as the best dense alternative (openvino int8, 4.1 ms) is 5.244x as fast as the dense network in "
        "deepsparse fp32 (21.5 ms)"
    )


def test_what_was_measured_once_is_taken_again(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    network = Prepared(model)
    keep_dense(network, tmp_path / "dense.onnx")
    monkeypatch.setattr(aim, "quantise_all", lambda *_, **__: Quantised({}, {"openvino int8": "no tool"}))
    calls = []

    def measured(candidates, runtime, workload, *, where, progress):
        calls.append([one.spec for one in candidates])
        return Alternatives((*FOUND.measured[:3],), {"openvino fp32": "not here"})

    monkeypatch.setattr(aim, "measure_alternatives", measured)

    def ask(runtime=None, count: int = 96) -> Alternatives:
        taken = samples.take(np.arange(count))
        return measure_dense(
            network, taken, runtime, workload_of(taken, 8), tmp_path / "dense.onnx", tmp_path, watch=Watch()
        )

    first = ask()
    again = ask()
    with open_runtime("onnxruntime") as runtime:
        ask(runtime)
    assert calls == [["deepsparse", "onnxruntime", "openvino:fp32", "openvino:bf16"]]
    assert first.missing == again.missing == {"openvino fp32": "not here", "openvino int8": "no tool"}
    assert [(one.name, one.candidate.spec, one.seconds) for one in again.measured] == [
        (one.name, one.candidate.spec, one.seconds) for one in FOUND.measured[:3]
    ]
    ask(count=50)
    assert len(calls) == 2


def test_times_of_a_formula_have_no_other_opponent(model: onnx.ModelProto, samples: Samples, tmp_path: Path):
    network = Prepared(model)
    keep_dense(network, tmp_path / "dense.onnx")
    with open_runtime("fake") as runtime:
        found = measure_dense(
            network, samples, runtime, workload_of(samples, 8), tmp_path / "dense.onnx", tmp_path, watch=Watch()
        )
        assert [one.name for one in found.measured] == ["fake formula"]
        assert against_best(found, runtime).of_same == 1
