"""Dense alternatives, against scripted engines and once against real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.pipeline import alternatives
from onnx_spdy.pipeline.alternatives import (
    DENSE,
    PRUNED,
    Alternative,
    Alternatives,
    elsewhere,
    here,
    judged,
    measure_alternatives,
)
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.metric import Evaluation, MetricError, top1
from onnx_spdy.pipeline.quantised.make import NOTHING, Quantised
from onnx_spdy.runtimes import (
    Environment,
    ModelRefused,
    RuntimeUnavailable,
    Workload,
    open_runtime,
)

DENSE_FILE, PRUNED_FILE, INT8_FILE = Path("dense.onnx"), Path("pruned.onnx"), Path("int8.onnx")


def environment(name: str, precision: str = "fp32") -> Environment:
    return Environment(name, "1", precision, "cpu", "avx512_bf16", 2, 2, 1, "host")


class ScriptedSession:
    """Takes the seconds that it is told; remembers whether it is open."""

    fallback = None

    def __init__(self, runtime: ScriptedRuntime, seconds: float) -> None:
        self.environment = environment(runtime.name, runtime.precision or "fp32")
        self._runtime, self._seconds, self.closed = runtime, seconds, False

    def seconds(self, iterations: int, warmup: int = 0) -> list[float]:
        if self._runtime.refuses_runs:
            raise ModelRefused(f"{self._runtime.name} can't run the model: NaN in a shape")
        return [self._seconds] * iterations

    def __enter__(self) -> ScriptedSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


class ScriptedRuntime:
    """Dense and pruned seconds by file, or the reason why there are none."""

    def __init__(
        self, name: str, dense: float, pruned: float = 0.0, *,
        precision: str | None = None, problem: Exception | None = None, refuses_runs: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.precision, self.problem, self.refuses_runs = name, precision, problem, refuses_runs
        self._seconds = {DENSE_FILE: dense, PRUNED_FILE: pruned, INT8_FILE: dense / 4}
        self.sessions: list[ScriptedSession] = []

    def open(self, model: Path, workload: Workload) -> ScriptedSession:
        if self.problem:
            raise self.problem
        self.sessions.append(ScriptedSession(self, self._seconds[model]))
        return self.sessions[-1]

    def __enter__(self) -> ScriptedRuntime:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def machine(monkeypatch):
    """An engine of each kind, as `open_runtime` finds them; a test changes what it is about."""
    engines = {
        "deepsparse": ScriptedRuntime("deepsparse", 0.050, 0.020),
        "onnxruntime": ScriptedRuntime("onnxruntime", 0.060, 0.060),
        "openvino:fp32": ScriptedRuntime("openvino", 0.055, 0.055, precision="fp32"),
        "openvino:bf16": ScriptedRuntime("openvino", 0.010, 0.010, precision="bf16"),
    }
    monkeypatch.setattr(alternatives, "open_runtime", lambda spec, **options: engines[spec])
    return engines


def found(machine, spec: str = "deepsparse", quantised: Quantised = NOTHING, narrow: bool = False) -> Alternatives:
    runtime = machine[spec]
    candidates = [here(PRUNED, PRUNED_FILE, runtime), here(DENSE, DENSE_FILE, runtime)]
    candidates += elsewhere(DENSE, DENSE_FILE, quantised, runtime)
    if narrow:
        candidates += elsewhere(PRUNED, PRUNED_FILE, NOTHING, runtime)
    return measure_alternatives(candidates, runtime, Workload(1))


def test_pruned_and_every_dense_choice_are_measured_once_each(machine):
    result = found(machine)
    assert [(one.role, one.name, one.seconds.median) for one in result.measured] == [
        ("pruned", "deepsparse fp32", 0.020),
        ("dense", "deepsparse fp32", 0.050),
        ("dense", "onnxruntime fp32", 0.060),
        ("dense", "openvino fp32", 0.055),
        ("dense", "openvino bf16", 0.010),
    ]
    assert result.missing == {}
    assert all(session.closed for engine in machine.values() for session in engine.sessions)


def test_the_target_is_not_its_own_alternative_but_its_other_precision_is(machine):
    names = [one.name for one in found(machine, "openvino:bf16").measured]
    assert names == ["openvino bf16", "openvino bf16", "deepsparse fp32", "onnxruntime fp32", "openvino fp32"]


def test_an_engine_that_is_not_there_or_refuses_the_network_is_a_reason_and_no_error(machine):
    machine["openvino:bf16"].problem = RuntimeUnavailable("no bf16 instructions")
    machine["openvino:fp32"].problem = ModelRefused("no such operator")
    machine["onnxruntime"].refuses_runs = True
    result = found(machine)
    assert [one.name for one in result.measured] == ["deepsparse fp32", "deepsparse fp32"]
    assert result.missing == {
        "onnxruntime": "onnxruntime can't run the model: NaN in a shape",
        "openvino fp32": "no such operator",
        "openvino bf16": "no bf16 instructions",
    }


def test_the_target_itself_must_work(machine):
    machine["deepsparse"].problem = ModelRefused("no such operator")
    with pytest.raises(ModelRefused, match="no such operator"):
        found(machine)


def test_a_bug_is_not_taken_for_a_missing_engine(machine):
    machine["openvino:fp32"].problem = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        found(machine)


def test_deepsparse_is_not_downloaded_for_a_comparison(machine, monkeypatch):
    asked = {}

    def opened(spec, **options):
        asked[spec] = options
        return machine[spec]

    monkeypatch.setattr(alternatives, "open_runtime", opened)
    found(machine, "onnxruntime")
    assert asked == {"deepsparse": {"download": False}, "openvino:fp32": {}, "openvino:bf16": {}}


def test_fake_is_compared_with_itself_only(model: onnx.ModelProto, tmp_path: Path):
    onnx.save(model, tmp_path / "net.onnx")
    with open_runtime("fake") as runtime:
        path = tmp_path / "net.onnx"
        candidates = [
            here(PRUNED, path, runtime),
            here(DENSE, path, runtime),
            *elsewhere(DENSE, path, NOTHING, runtime),
        ]
        result = measure_alternatives(candidates, runtime, Workload(2))
    assert [(one.role, one.name) for one in result.measured] == [("pruned", "fake formula"), ("dense", "fake formula")]
    assert result.missing == {}


def test_a_network_in_int8_is_one_more_choice_of_its_engine(machine):
    quantised = Quantised({"openvino int8": INT8_FILE}, {"onnxruntime int8": "no such tool"})
    result = found(machine, quantised=quantised).without(quantised.missing)
    times = {one.candidate.name: one.seconds.median for one in result.of(DENSE)}
    assert times["openvino int8"] == pytest.approx(0.055 / 4)
    assert result.missing == {"onnxruntime int8": "no such tool"}


def test_a_narrow_network_is_measured_everywhere_too(machine):
    machine["openvino:bf16"].problem = RuntimeUnavailable("no bf16 instructions")
    result = found(machine, narrow=True)
    assert [one.name for one in result.of(PRUNED)] == ["deepsparse fp32", "onnxruntime fp32", "openvino fp32"]
    assert set(result.missing) == {"openvino bf16", "pruned openvino bf16"}


def test_what_can_not_be_the_best_is_measured_once(machine):
    """Dense: what is much slower than one in full precision. Pruned: much slower than where it was asked for."""
    machine["onnxruntime"] = ScriptedRuntime("onnxruntime", 0.090, 0.090)
    visits = {one.candidate.label: len(one.seconds.seconds) for one in found(machine, narrow=True).measured}
    assert visits == {
        "pruned deepsparse": 6, "deepsparse": 6, "onnxruntime": 1, "openvino fp32": 6, "openvino bf16": 6,
        "pruned onnxruntime": 1, "pruned openvino fp32": 1, "pruned openvino bf16": 6,
    }  # fmt: skip


def test_only_what_computes_in_full_precision_shares_a_metric(machine, monkeypatch):
    asked = []

    def evaluated(path, by, *, runtime):
        asked.append((path, runtime.precision))
        if path == INT8_FILE:
            raise MetricError("it returned nan")
        return 0.5

    monkeypatch.setattr(alternatives, "judge", evaluated)
    result = found(machine, quantised=Quantised({"onnxruntime int8": INT8_FILE}, {}))
    machine["onnxruntime"].precision = "int8"
    samples = Evaluation(Samples({"input": np.zeros((2, 1), np.float32)}), top1, "top1")
    known = {DENSE_FILE: 0.9, PRUNED_FILE: 0.8}
    metrics = judged(result, samples, known, machine["deepsparse"])
    assert [(one.role, one.name, one.metric) for one in metrics.measured] == [
        ("pruned", "deepsparse fp32", 0.8),
        ("dense", "deepsparse fp32", 0.9),
        ("dense", "onnxruntime fp32", 0.9),
        ("dense", "openvino fp32", 0.9),
        ("dense", "openvino bf16", 0.5),
    ]
    assert metrics.missing == {"onnxruntime int8": "no top1: it returned nan"}
    assert asked == [(DENSE_FILE, "bf16"), (INT8_FILE, "int8")]


def test_everything_fits_into_a_report(machine):
    machine["onnxruntime"].problem = RuntimeUnavailable("not installed")
    document = json.loads(json.dumps(found(machine).to_json()))
    assert [one["role"] for one in document["measured"]] == ["pruned", "dense", "dense", "dense"]
    assert document["measured"][0]["median_seconds"] == 0.020
    assert document["missing"] == {"onnxruntime": "not installed"}
    again = [Alternative.from_json(one, Path(f"{one['role']}.onnx")) for one in document["measured"]]
    assert [(one.name, one.seconds, one.environment, one.metric) for one in again] == [
        (one.name, one.seconds, one.environment, one.metric) for one in found(machine).measured
    ]


@pytest.mark.engine
def test_real_engines_beside_each_other(model: onnx.ModelProto, tmp_path: Path):
    try:
        open_runtime("openvino").check()
    except RuntimeUnavailable as exc:
        pytest.skip(str(exc))
    onnx.save(model, tmp_path / "net.onnx")
    steps = []
    with open_runtime("onnxruntime") as runtime:
        path = tmp_path / "net.onnx"
        candidates = [
            here(PRUNED, path, runtime),
            here(DENSE, path, runtime),
            *elsewhere(DENSE, path, NOTHING, runtime),
        ]
        result = measure_alternatives(
            candidates, runtime, Workload(8, 1),
            progress=lambda done, total, note: steps.append((done, total)),
        )  # fmt: skip
    names = [one.name for one in result.measured]
    assert names[:2] == ["onnxruntime fp32"] * 2
    assert "openvino fp32" in names
    assert ("openvino bf16" in names) != ("openvino bf16" in result.missing)
    assert ("deepsparse fp32" in names) != ("deepsparse" in result.missing)
    assert {one.environment.batch for one in result.measured} == {8}
    assert {len(one.seconds.seconds) for one in result.measured[:2]} == {6}
    assert {len(one.seconds.seconds) for one in result.measured} <= {1, 6}
    assert steps[-1] == (6, 6)
