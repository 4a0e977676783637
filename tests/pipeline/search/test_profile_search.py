"""The search stage: what a profile says of itself, and work that was stopped."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.correct import LEAST_SAMPLES
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.layer_database import LayerDatabase, build_database
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.objective import Objective, growing_batches
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.progress import ignore, never
from onnx_spdy.pipeline.search.methods.thompson import probed_levels
from onnx_spdy.pipeline.search.profile_loss import ProfileLoss
from onnx_spdy.pipeline.search.profile_search import ADJUSTING_SHARE, ProfileSearch, split
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.pipeline.solve import solve
from onnx_spdy.pipeline.stitch import CORRECTED, JUDGED_SAMPLES, CorrectedStitcher, Stitcher
from onnx_spdy.runtimes import Workload, open_runtime

LEVELS = levels_for("unstructured")
PROBED = probed_levels(LEVELS)[0]
Finder = Callable[..., ProfileSearch]


@pytest.fixture(scope="module")
def data() -> Samples:
    rng = np.random.default_rng(1)
    return Samples({"input": rng.normal(size=(300, 3, 12, 12)).astype(np.float32).cumsum(axis=3)})


@pytest.fixture(scope="module")
def table(model: onnx.ModelProto) -> LatencyTable:
    with open_runtime("fake", layer_overhead_seconds=0.0, node_seconds=1e-9) as runtime:
        return measure_latency(Prepared(model), runtime, LEVELS, Workload(8))


@pytest.fixture(scope="module")
def database(model: onnx.ModelProto, data: Samples, tmp_path_factory: pytest.TempPathFactory) -> LayerDatabase:
    folder = tmp_path_factory.mktemp("database")
    return build_database(Network(Prepared(model)), data, Compression(LEVELS, pruner_named("magnitude")), folder)


@pytest.fixture
def finder(model: onnx.ModelProto, table: LatencyTable, database: LayerDatabase, data: Samples) -> Finder:
    def make(*, table=table, state=None, progress=ignore, listen=never, **settings) -> ProfileSearch:
        network = Network(Prepared(model))
        return ProfileSearch(
            network, table, database, data, SearchSettings(**settings), state=state, progress=progress, listen=listen
        )

    return make


class Stopping:
    """A user who asks to stop after so many evaluations."""

    def __init__(self, after: int) -> None:
        self.after, self.count = after, 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Callable[[], bool]]:
        yield lambda: self.count >= self.after

    def progress(self, done: int, total: int, note: str) -> None:
        self.count += 1


def test_a_search_that_was_stopped_goes_on_to_the_same_profile(finder: Finder, tmp_path: Path) -> None:
    whole = finder().find(2.0)
    assert whole.ended == "finished"
    state, path, user = tmp_path / "search.json", tmp_path / "profile.json", Stopping(11)
    stopped = finder(state=state, listen=user, progress=user.progress).find_or_load(2.0, path)
    assert stopped.ended == "interrupted"
    assert stopped.samples_run < whole.samples_run
    again = finder(state=state)
    ran = counted(again)
    continued = again.find_or_load(2.0, path)
    assert continued == whole
    assert (
        ran() <= whole.samples_run - stopped.samples_run + 32
    )  # one batch is the loss of the profile that it stopped with
    assert finder(state=state).find_or_load(2.0, path) == whole


def counted(finder: ProfileSearch) -> Callable[[], int]:
    """How many samples really go through the network from now on for scores."""
    objective, count = finder._score.objective, 0
    run = objective.of_batch

    def of_batch(number: int, *arguments, **more) -> float:
        nonlocal count
        count += len(objective.batches[number])
        return run(number, *arguments, **more)

    objective.of_batch = of_batch  # type: ignore[method-assign]
    return lambda: count


def test_a_finished_profile_is_not_searched_again_but_another_question_is(finder: Finder, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    first = finder(method="dp").find_or_load(2.0, path)
    assert finder(method="dp").find_or_load(2.0, path) == first
    assert finder(method="dp", seed=1).find_or_load(2.0, path).seed == 1
    assert finder(method="uniform").find_or_load(2.0, path).search == "uniform"


@pytest.mark.parametrize("field", ["transition", "predecessor", "sparse", "seconds"])
def test_tables_that_differ_anywhere_are_other_tables(finder: Finder, table: LatencyTable, field: str) -> None:
    changed = getattr(table, field).copy()
    changed[-1] = ~changed[-1] if field == "sparse" else (-1 if field == "predecessor" else changed[-1] + 1e-9)
    other = dataclasses.replace(table, **{field: changed})
    hashes = {
        finder(table=one, method="dp").find(1.5).made_from["table_sha256"]
        for one in (table, dataclasses.replace(table), other)
    }
    assert len(hashes) == 2


def test_a_table_of_inputs_of_other_shapes_is_refused(
    model: onnx.ModelProto, data: Samples, table: LatencyTable
) -> None:
    mine = workload_of(data, 8)
    table.check_workload(model.graph, mine)  # measured with random inputs of the shapes that the data has
    other = dataclasses.replace(table, workload=Workload(8, inputs={"input": np.zeros(8)}).digest)
    with pytest.raises(ArtifactError, match=r"latency table was measured with .* \(input float32\[8, 3, 12, 12\]\)"):
        other.check_workload(model.graph, mine)


def test_targets_of_one_search_share_what_it_scored(finder: Finder) -> None:
    """Each layer alone, for instance, is scored once for all targets."""

    def alone(one: ProfileSearch, first: int) -> int:
        return sum(sorted(score.choice) == [0, 0, 0, PROBED] for score in one._score.log[first:])

    together, fresh = finder(), finder()
    together.find(3.0)
    scored = len(together._score.log)
    together.find(2.0)
    fresh.find(2.0)
    assert alone(together, 0) == alone(fresh, 0) > 0
    assert alone(together, scored) == 0


def test_the_loss_is_that_of_the_stitched_network_also_on_held_out_samples(
    finder: Finder, model: onnx.ModelProto, database: LayerDatabase, data: Samples
) -> None:
    profile = finder(seed=3, samples=100).find(2.0)
    selected, held_out = split(data, 100, 3)
    assert held_out is not None
    assert len(selected) == len(held_out) == 100
    network = Network(Prepared(model))
    weights = Stitcher(network, database).weights(list(profile.levels.values()))
    for samples, expected in ((selected, profile.loss), (held_out, profile.held_out_loss)):
        assert Objective(network, samples)(weights) == pytest.approx(expected, rel=1e-6)


def test_selection_and_held_out_samples_are_disjoint_and_all_of_few_are_used() -> None:
    samples = Samples({"input": np.arange(40, dtype=np.float32)[:, None]})
    selected, held_out = split(samples, 128, 0)
    assert held_out is not None
    both = np.r_[selected.inputs["input"][:, 0], held_out.inputs["input"][:, 0]]
    assert sorted(both) == list(range(40))
    assert split(samples.take(slice(0, 1)), 128, 0)[1] is None


def test_the_errors_of_a_profile_lead_to_faster_and_slower_ones(finder: Finder) -> None:
    search = finder()
    profile = search.find(2.0)
    faster, slower = search.adjusted(profile, 2.2), search.adjusted(profile, 1.8)
    assert faster.predicted_speedup >= 2.2 > profile.predicted_speedup >= 2.0
    assert profile.predicted_speedup >= slower.predicted_speedup >= 1.8
    assert slower.loss <= profile.loss < faster.loss


def test_adjusting_a_profile_runs_few_samples_and_finds_no_less_than_the_known_errors_do(
    finder: Finder, table: LatencyTable
) -> None:
    search = finder()
    profile, score = search.find(2.0), search._score
    before = search.samples_run
    faster = search.adjusted(profile, 2.3)
    assert search.samples_run - before <= (ADJUSTING_SHARE + 2) * score.objective.stages[-1]
    assert faster.loss <= score(solve(np.array(profile.errors), table.costs, table.budget(2.3)))


def test_a_time_limit_ends_a_search_with_a_profile_that_says_so(finder: Finder) -> None:
    profile = finder(time_limit_seconds=0.0).find(2.0)
    assert profile.ended == "time limit"
    assert profile.predicted_speedup >= 2.0


def test_statistics_are_corrected_only_where_that_lowers_the_loss(
    finder: Finder, model: onnx.ModelProto, database: LayerDatabase, data: Samples
) -> None:
    profile = finder(method="uniform").find(2.0)
    other = np.concatenate([10 + 5 * data.inputs["input"], data.inputs["input"][:JUDGED_SAMPLES]])
    for samples, better in ((data, True), (Samples({"input": other}), False)):
        network = Network(Prepared(model))
        stitcher = CorrectedStitcher(Stitcher(network, database), samples)
        for _ in range(2):
            pruned = stitcher.stitch(profile)
            assert (pruned.corrected == CORRECTED) is better
            assert bool(set(pruned.weights) - {layer.weight for layer in network.layers}) is better  # biases


def test_scores_are_the_same_whether_the_network_ran_whole_or_from_a_later_layer(
    model: onnx.ModelProto, database: LayerDatabase, data: Samples
) -> None:
    def score() -> ProfileLoss:
        network = Network(Prepared(model))
        return ProfileLoss(Stitcher(network, database), Objective(network, data))

    rng = np.random.default_rng(0)
    choice, kept = np.zeros(4, int), score()
    for step in range(12):
        choice = choice.copy()
        choice[rng.integers(4)] = rng.integers(42)
        samples = [None, 32, 64][step % 3]
        assert kept(choice, samples) == score()(choice, samples)


def test_more_samples_of_a_profile_only_run_the_new_ones(
    network: Network, database: LayerDatabase, data: Samples
) -> None:
    score = ProfileLoss(Stitcher(network, database), Objective(network, data))
    choice = np.full(4, 20)
    assert score.objective.stages == (32, 64, 128, 256, 300)
    for samples, run in ((32, 32), (20, 32), (128, 128), (None, 300), (64, 300)):
        score(choice, samples)
        assert score.samples_run == run


def test_batches_grow_and_hold_every_sample() -> None:
    for count in (1, 31, 32, 33, 100, 128, 1000):
        sizes = growing_batches(count)
        assert sum(sizes) == count
        assert max(sizes) < 64 + LEAST_SAMPLES
        assert min(sizes) >= min(count, LEAST_SAMPLES)  # fewer can't be corrected by their own statistics


def test_a_profile_is_the_same_after_saving(finder: Finder, tmp_path: Path) -> None:
    profile = finder(method="dp").find(2.0)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
