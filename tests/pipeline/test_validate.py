"""The measured speedup of an engine that is a little faster or slower at each visit."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import save_model
from onnx_spdy.pipeline import validate as stage
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.metric import Evaluation
from onnx_spdy.pipeline.validate import VISITS, judge, validate
from onnx_spdy.runtimes import Workload, open_runtime
from onnx_spdy.runtimes.fake import FakeRuntime, FakeSession


class Moody(FakeRuntime):
    """Each opened network has a luck of its own; visits may be disturbed."""

    def __init__(self, luck: float, busy_visits: tuple[int, ...] = ()) -> None:
        super().__init__(noise=1e-4)
        self.rng, self.luck, self.busy_visits = np.random.default_rng(0), luck, busy_visits
        self.opened = self.asked = 0

    def open(self, model: Path, workload: Workload, **arguments) -> FakeSession:
        self.opened += 1
        session = super().open(model, workload, **arguments)
        session._total_seconds *= float(np.exp(self.luck * self.rng.standard_normal()))
        return session

    def foreign_cores(self) -> float | None:
        self.asked += 1
        visit, ends = divmod(self.asked - 1, 2)
        return 5.0 if ends and visit in self.busy_visits else 0.0


@pytest.fixture
def path(model: onnx.ModelProto, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BUSY_WAITS_SECONDS", (0.001, 0.001))


def test_bounds_know_that_the_next_visit_may_have_other_luck(path: Path) -> None:
    runtime = Moody(luck=0.05)
    found = validate(path, path, runtime, Workload(2))
    assert runtime.opened == 2 * VISITS
    assert found.lower < 1 < found.upper  # the networks are the same, so 1 is the truth
    assert found.upper / found.lower > 1.03  # the rounds alone would say 1.0002
    assert (found.lower, found.upper) == (sorted(found.visits)[1], sorted(found.visits)[-2])


def test_two_validations_together_have_narrower_bounds(path: Path) -> None:
    runtime = Moody(luck=0.05)
    one, other = (validate(path, path, runtime, Workload(2)) for _ in range(2))
    both = one.with_more(other)
    assert len(both.visits) == 2 * VISITS
    for kept in (both.dense, both.pruned):
        assert len(kept.seconds) == 2 * VISITS * stage.ROUNDS
        assert len(kept.warmup_seconds) == 2 * VISITS * stage.WARMUP
    assert both.lower > min(one.lower, other.lower)
    assert both.upper < max(one.upper, other.upper)
    assert len(both.dense.seconds) == 2 * len(one.dense.seconds)


def test_a_disturbed_visit_is_repeated(path: Path) -> None:
    runtime = Moody(luck=0.0, busy_visits=(1,))
    found = validate(path, path, runtime, Workload(2))
    assert runtime.opened == 2 * (VISITS + 1)
    assert found.foreign_cores == 0.0
    assert len(found.visits) == VISITS


def test_disturbance_that_does_not_end_is_told(path: Path) -> None:
    found = validate(path, path, Moody(luck=0.0, busy_visits=tuple(range(99))), Workload(2))
    assert found.foreign_cores == 5.0


def test_too_few_visits_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="at least 6"):
        validate(path, path, FakeRuntime(), Workload(2), visits=3)


def test_a_metric_is_computed_once_for_each_network_and_runtime(model: onnx.ModelProto, path: Path) -> None:
    calls = []
    samples = Samples({"input": np.zeros((4, 3, 12, 12), np.float32)})
    evaluation = Evaluation(samples, lambda outputs, target: calls.append(1) or float(len(calls)), "count")
    assert judge(path, evaluation) == judge(path, evaluation) == 1
    with open_runtime("onnxruntime") as runtime:
        assert judge(path, evaluation, runtime=runtime) == 2
    model = onnx.ModelProto.FromString(model.SerializeToString())  # the fixture is everyone's
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    save_model(model, path)
    assert judge(path, evaluation) == 3
