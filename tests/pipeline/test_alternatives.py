"""Dense alternatives, against scripted engines and once against real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.pipeline import alternatives
from onnx_spdy.pipeline.alternatives import (
    Alternative,
    Alternatives,
    fastest_dense,
    measure_alternatives,
    verdict,
)
from onnx_spdy.runtimes import (
    Environment,
    Measurement,
    ModelRefused,
    RuntimeUnavailable,
    Workload,
    open_runtime,
)

DENSE, PRUNED = Path("dense.onnx"), Path("pruned.onnx")


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
        self._seconds = {DENSE: dense, PRUNED: pruned}
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


def found(machine, spec: str = "deepsparse") -> Alternatives:
    return measure_alternatives(DENSE, PRUNED, machine[spec], Workload(1))


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
    assert fastest_dense(result).name == "openvino bf16"
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
        result = measure_alternatives(tmp_path / "net.onnx", tmp_path / "net.onnx", runtime, Workload(2))
    assert [(one.role, one.name) for one in result.measured] == [("pruned", "fake formula"), ("dense", "fake formula")]
    assert result.missing == {}


def test_a_dense_alternative_that_wins_is_named_with_both_times_and_bounds(machine):
    assert verdict(found(machine)) == (
        "The dense network in openvino bf16 is 2.00x as fast as the pruned one in deepsparse fp32 "
        "(10.0 against 20.0 ms; 95% bounds 2.00 to 2.00): rather deploy that, if its accuracy in bf16 is good enough."
    )


def test_one_in_the_same_precision_costs_no_accuracy(machine):
    machine["openvino:bf16"].problem = RuntimeUnavailable("no bf16 instructions")
    machine["onnxruntime"] = ScriptedRuntime("onnxruntime", 0.005)
    assert verdict(found(machine)).endswith("rather deploy that, which loses no accuracy.")


def test_a_pruned_network_that_wins_is_compared_with_the_best_alternative(machine):
    machine["openvino:bf16"].problem = RuntimeUnavailable("no bf16 instructions")
    assert verdict(found(machine)) == (
        "The pruned network in deepsparse fp32 beats every dense alternative that was measured: it is 2.50x as fast as "
        "the best of them, deepsparse fp32 (20.0 against 50.0 ms; 95% bounds 2.50 to 2.50)."
    )


def test_times_whose_bounds_meet_are_a_tie():
    around = np.array([0.9, 0.95, 1.0, 1.0, 1.05, 1.1])
    both = Alternatives(
        (
            Alternative("deepsparse fp32", "pruned", Measurement((1.234,) * 6), environment("deepsparse"), None),
            Alternative(
                "openvino fp32", "dense", Measurement(tuple(1.234 * around)), environment("openvino"), None
            ),
        ),
        {},
    )  # fmt: skip
    assert verdict(both) == (
        "The pruned network in deepsparse fp32 and the dense one in openvino fp32 can't be told apart (1234 against "
        "1234 ms; 95% bounds of their ratio 0.90 to 1.10): pruning buys no speed over that."
    )


def test_the_bounds_hold_the_truth_when_a_noisy_alternative_is_slightly_faster():
    """Paired rounds: drift that hits both at once must not hide a difference of 5 %."""
    random = np.random.default_rng(3)
    drift = np.exp(np.cumsum(0.05 * random.standard_normal(25)))
    noise = np.exp(0.01 * random.standard_normal((2, 25)))
    sides = [
        Alternative(
            name, role, Measurement(tuple(base * drift * one)), environment(name.split()[0]), None
        )
        for name, role, base, one in zip(
            ("deepsparse fp32", "openvino fp32"), ("pruned", "dense"), (0.0105, 0.0100), noise, strict=True
        )
    ]  # fmt: skip
    assert verdict(Alternatives(tuple(sides), {})).startswith("The dense network in openvino fp32 is 1.0")


def test_everything_fits_into_a_report(machine):
    machine["onnxruntime"].problem = RuntimeUnavailable("not installed")
    document = json.loads(json.dumps(found(machine).to_json()))
    assert [one["role"] for one in document["measured"]] == ["pruned", "dense", "dense", "dense"]
    assert document["measured"][0]["median_seconds"] == 0.020
    assert document["missing"] == {"onnxruntime": "not installed"}
    assert document["verdict"].startswith("The dense network in openvino bf16")


@pytest.mark.engine
def test_real_engines_beside_each_other(model: onnx.ModelProto, tmp_path: Path):
    try:
        open_runtime("openvino").check()
    except RuntimeUnavailable as exc:
        pytest.skip(str(exc))
    onnx.save(model, tmp_path / "net.onnx")
    steps = []
    with open_runtime("onnxruntime") as runtime:
        result = measure_alternatives(
            tmp_path / "net.onnx", tmp_path / "net.onnx", runtime, Workload(8, 1),
            progress=lambda done, total, note: steps.append((done, total)),
        )  # fmt: skip
    names = [one.name for one in result.measured]
    assert names[:2] == ["onnxruntime fp32"] * 2
    assert "openvino fp32" in names
    assert ("openvino bf16" in names) != ("openvino bf16" in result.missing)
    assert ("deepsparse fp32" in names) != ("deepsparse" in result.missing)
    assert {one.environment.batch for one in result.measured} == {8}
    assert {len(one.seconds.seconds) for one in result.measured} == {6}
    assert steps[-1] == (6, 6)
    assert "the pruned" in verdict(result).lower()
