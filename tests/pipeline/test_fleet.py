"""Several devices: one network for all of them, tables measured side by side, and what each of them is told."""

import json
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.fleet import device as device_module
from onnx_spdy.pipeline.fleet.device import Device, FleetError, device_names, side_by_side
from onnx_spdy.pipeline.fleet.fleet import one_form
from onnx_spdy.pipeline.fleet.together import Tables, Together
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.metric import Evaluation, top1
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.report import Report
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.runtimes import open_runtime
from onnx_spdy.runtimes.fake import FakeRuntime

LEVELS = levels_for("unstructured")
SLOW_OVERHEAD = {"layer_overhead_seconds": 2e-6, "node_seconds": 1e-9}
NO_OVERHEAD = {"layer_overhead_seconds": 0.0, "node_seconds": 1e-9}


@pytest.fixture
def samples() -> Samples:
    rng = np.random.default_rng(1)
    return Samples({"input": rng.normal(size=(96, 3, 12, 12)).astype(np.float32)}, rng.integers(0, 10, 96))


def table(model: onnx.ModelProto, samples: Samples, **options: float) -> LatencyTable:
    with open_runtime("fake", **options) as runtime:
        return measure_latency(Prepared(model), runtime, LEVELS, workload_of(samples, 8))


def test_one_network_meets_the_target_on_every_device(model: onnx.ModelProto, samples: Samples, tmp_path: Path) -> None:
    with open_runtime("fake", **SLOW_OVERHEAD) as one, open_runtime("fake", **NO_OVERHEAD) as other:
        report = run(
            Prepared(model), samples, [Device(one, "slow"), Device(other, "quick")], workload_of(samples, 8),
            Target(1.3, tmp_path), compression=Compression(LEVELS, pruner_named("magnitude")),
            evaluation=Evaluation(samples, top1, "top1"),
        )  # fmt: skip
    assert [*report.content["devices"]] == ["slow", "quick"]
    for name, short in report.content["devices"].items():
        own = Report.load(tmp_path / name / "report.json").content
        assert own["measured_speedup_lower"] == short["measured_speedup_lower"] >= 1.3
        found = LatencyTable.load(tmp_path / name / "latency.json")
        levels = Profile.load(tmp_path / "profile.json").levels
        choice = [found.levels.index(level) for level in levels.values()]
        assert own["predicted_speedup"] == pytest.approx(found.dense_seconds / found.predict(choice))
        assert own["layers"][0]["dense_seconds"] == pytest.approx(found.costs.of_layers([0] * len(choice))[0])
    least = min(short["measured_speedup_lower"] for short in report.content["devices"].values())
    assert report.content["measured_speedup_lower"] == least
    assert json.loads((tmp_path / "report.json").read_text())["devices"] == report.content["devices"]
    assert not (tmp_path / "latency.json").exists()
    assert (tmp_path / "model.onnx").exists()


def test_the_tables_of_several_devices_are_one(model: onnx.ModelProto, samples: Samples) -> None:
    slow, quick = table(model, samples, **SLOW_OVERHEAD), table(model, samples, **NO_OVERHEAD)
    both = Tables({"slow": slow, "quick": quick}, {"slow": 1.0, "quick": 1.0})
    assert both.highest_speedup == pytest.approx(min(slow.highest_speedup, quick.highest_speedup), rel=0.01)
    choice = np.full(len(slow.layers), 20)
    speedups = [one.dense_seconds / one.predict(choice) for one in (slow, quick)]
    assert 1 / both.predict(choice) == pytest.approx(min(speedups))
    limits = both.limits(1.2)
    assert [one.seconds for one in limits] == pytest.approx([slow.budget(1.2), quick.budget(1.2)])
    with pytest.raises(NoSpeedup, match="the highest reachable is"):
        both.limits(50)
    with pytest.raises(ArtifactError, match="slow and quick differ in layers"):
        Tables({"slow": slow, "quick": LatencyTable(**{**vars_of(quick), "layers": quick.layers[::-1]})}, {})


def vars_of(one: LatencyTable) -> dict:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


class Measured:
    """Stands for a validation: its bounds."""

    def __init__(self, lower: float) -> None:
        self.lower = self.speedup = self.upper = lower


def test_what_a_device_measured_corrects_its_table_alone(model: onnx.ModelProto, samples: Samples) -> None:
    slow, quick = table(model, samples, **SLOW_OVERHEAD), table(model, samples, **NO_OVERHEAD)
    both = Tables({"slow": slow, "quick": quick}, {"slow": 1.0, "quick": 1.0})
    choice = np.full(len(slow.layers), 20)
    by_table = {"slow": slow.dense_seconds / slow.predict(choice), "quick": quick.dense_seconds / quick.predict(choice)}
    measured = {"slow": Measured(by_table["slow"]), "quick": Measured(by_table["quick"] * 0.9)}
    both.learn(choice, Together(measured, {"slow": 1.0, "quick": 1.0}))  # type: ignore[arg-type]
    limits = both.limits(1.2)
    assert [one.seconds for one in limits] == pytest.approx([slow.budget(1.2), quick.budget(1.2 / 0.9)])
    assert 1 / both.corrected(choice) == pytest.approx(min(one.lower for one in measured.values()))
    assert 1 / both.predict(choice) == pytest.approx(min(by_table.values()))


def test_a_target_against_the_best_alternative_is_of_each_device_its_own() -> None:
    together = Together({"one": Measured(4.0), "two": Measured(2.2)}, {"one": 2.0, "two": 1.0})  # type: ignore[arg-type]
    assert (together.lower, together.slowest) == (2.0, "one")


def test_machines_work_at_the_same_time_and_one_machine_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"a1": "ssh://a/", "a2": "ssh://a/", "b1": "ssh://b/"}
    devices = [Device(FakeRuntime(), name) for name in machine]
    of = {id(one.runtime): machine[one.name] for one in devices}
    monkeypatch.setattr(device_module, "location", lambda runtime: of[id(runtime)])
    both, busy, together = threading.Barrier(2, timeout=20), dict.fromkeys(machine.values(), 0), []

    def measure(device: Device) -> str:
        where = machine[device.name]
        busy[where] += 1
        assert busy[where] == 1, "two measurements on one machine"
        if device.name != "a2":
            both.wait()  # ends only if the other machine works meanwhile
            together.append(device.name)
        busy[where] -= 1
        return device.name

    assert side_by_side(devices, measure) == [*machine]
    assert sorted(together) == ["a1", "b1"]


def test_an_error_on_one_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [Device(FakeRuntime(), "one"), Device(FakeRuntime(), "two")]
    of = {id(one.runtime): f"ssh://{one.name}/" for one in devices}
    monkeypatch.setattr(device_module, "location", lambda runtime: of[id(runtime)])

    def fail(device: Device) -> None:
        if device.name == "two":
            raise NoSpeedup("two can't")

    with pytest.raises(NoSpeedup, match="two can't"):
        side_by_side(devices, fail)


def test_a_device_given_twice_is_refused() -> None:
    assert device_names(["openvino", "openvino:bf16"]) == ["openvino", "openvino-bf16"]
    assert device_names(["ssh://a:22/../x", "fake"])[0] == "ssh-a-22-..-x"
    with pytest.raises(FleetError, match="--runtime fake is given 2 times"):
        device_names(["fake", "openvino", "fake"])


def test_devices_that_want_int8_in_different_forms_have_no_network_together() -> None:
    with open_runtime("openvino") as one, open_runtime("onnxruntime") as other:
        assert one_form([Device(one)]) == one_form([Device(one, "a"), Device(one, "b")])
        with pytest.raises(FleetError, match="openvino:fp32, onnxruntime want int8 in different forms"):
            one_form([Device(one, "a"), Device(other, "b")])
