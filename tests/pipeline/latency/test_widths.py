"""Latency tables for widths: what two groups share, and networks that the table hasn't seen."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared, narrowed
from onnx_spdy.models.groups import Branch
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.latency.equations import Row, Trial
from onnx_spdy.pipeline.latency.fit_widths import fit_widths
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.places import Places, blocks
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.site import Site, find_sites
from onnx_spdy.runtimes import EngineCrashed, LayerTime, Runtime, Workload, open_runtime
from onnx_spdy.runtimes.fake import FakeRuntime
from tests.models.narrowing import two_blocks

LEVELS = levels_for("channels")
NAMES = ("a", "b", "c", "pool")
# Like a chain of two groups: a makes the first's units, b turns them into the second's, c takes those in.
CHAIN = Places(
    names=NAMES,
    readers={"a": ("b",), "b": ("c",), "c": ("pool",)},
    sites={"a": frozenset({0}), "b": frozenset({0, 1}), "c": frozenset({1}), "pool": frozenset()},
    products={"a": frozenset(), "b": frozenset({(0, 1)}), "c": frozenset(), "pool": frozenset()},
)
KEPT = np.linspace(1, 0.1, 10)[None].repeat(2, axis=0)


def seconds_of(first: float, second: float) -> dict[str, float]:
    """What the chain takes where so much is kept of its groups."""
    parts = {"a": 0.2 + first, "b": 0.5 + 0.3 * first + 0.4 * second + 6 * first * second, "c": 0.1 + 2 * second**1.2}
    return {**{name: 1e-3 * value for name, value in parts.items()}, "pool": 1e-3}


def trials_of(rng: np.random.Generator, noise: float, joined: bool = False) -> list[Trial]:
    """Measured networks; an engine that joins a and b does so only where the first group is wide."""
    dense, trials = sum(seconds_of(1, 1).values()), []
    for number in range(24):
        choice = (0, 0) if number % 8 == 0 else tuple(map(int, rng.integers(0, 10, 2)))
        first, second = KEPT[[0, 1], choice]
        parts, drift = seconds_of(first, second), np.exp(0.2 * rng.standard_normal())
        noisy = {name: drift * value * np.exp(noise * rng.standard_normal()) for name, value in parts.items()}
        rows = [Row((name,), value) for name, value in noisy.items()]
        if joined and first > 0.5:
            rows[:2] = [Row(("b",), noisy["a"] + noisy["b"])]  # which names only the last of them
        relative = sum(parts.values()) / dense * np.exp(noise / 5 * rng.standard_normal())
        trials.append(Trial(choice, tuple(rows), 0.0, relative, 0.01))
    return trials


@pytest.mark.parametrize(("noise", "joined", "most"), [(0.0, False, 0.01), (0.0, True, 0.01), (0.03, False, 0.05)])
def test_known_times_are_found_again(noise: float, joined: bool, most: float) -> None:
    rng = np.random.default_rng(0)
    dense = sum(seconds_of(1, 1).values())
    fit = fit_widths(trials_of(rng, noise, joined), CHAIN, KEPT, dense)
    assert [one.layers for one in fit.products] == [(0, 1)]
    for first in range(10):
        for second in range(10):
            truth = sum(seconds_of(KEPT[0, first], KEPT[1, second]).values()) / dense
            assert fit.relative(np.array([first, second])) == pytest.approx(truth, rel=most)


def test_without_products_the_same_times_are_not_found() -> None:
    """So the test above tells something of them."""
    places = Places(CHAIN.names, CHAIN.readers, CHAIN.sites, dict.fromkeys(NAMES, frozenset()))
    dense = sum(seconds_of(1, 1).values())
    fit = fit_widths(trials_of(np.random.default_rng(0), 0.0), places, KEPT, dense)
    truth = sum(seconds_of(0.1, 0.1).values()) / dense
    assert abs(fit.relative(np.array([9, 9])) / truth - 1) > 0.1


def test_what_is_joined_anywhere_counts_as_joined() -> None:
    apart = Trial((0, 0), (Row(("a",), 1.0), Row(("b",), 2.0), Row(("c",), 4.0), Row(("pool",), 8.0)), 0.0, 1.0, 0.01)
    joined = Trial((1, 1), (Row(("b",), 3.5), Row(("c",), 4.0), Row(("pool",), 8.0)), 0.0, 1.0, 0.01)
    assert blocks([apart, joined], CHAIN) == [
        {("a", "b"): 3.0, ("c",): 4.0, ("pool",): 8.0},
        {("a", "b"): 3.5, ("c",): 4.0, ("pool",): 8.0},
    ]


def test_fewer_units_are_never_slower_and_equally_many_take_the_same() -> None:
    kept = np.array([1, 0.75, 0.75, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25])[None].repeat(2, axis=0)
    rng = np.random.default_rng(1)
    trials = trials_of(rng, 0.1)
    fit = fit_widths(trials, CHAIN, kept, sum(seconds_of(1, 1).values()))
    assert (np.diff(fit.seconds, axis=1) <= 0).all()
    assert (np.diff(fit.seconds, axis=1)[kept[:, 1:] == kept[:, :-1]] == 0).all()
    assert (fit.seconds > 0).all()
    assert all((one.factors >= 0).all() for one in fit.products)
    assert (fit.spread >= 0).all()


def relative(network: Prepared, sites: tuple[Site, ...], runtime: Runtime, choice: np.ndarray, folder: Path) -> float:
    """What the runtime measures for a network of these widths, relative to the dense one."""
    keep = {site.name: range(site.kept(LEVELS[level])) for site, level in zip(sites, choice, strict=True)}
    onnx.save(network.proto, folder / "d.onnx")
    onnx.save(narrowed(network, keep), folder / "n.onnx")
    with runtime.open(folder / "n.onnx", Workload(8)) as one, runtime.open(folder / "d.onnx", Workload(8)) as dense:
        return one.seconds(1)[0] / dense.seconds(1)[0]


def test_mixed_networks_are_predicted(model: onnx.ModelProto, tmp_path: Path) -> None:
    network, runtime = Prepared(model), FakeRuntime(seconds_per_mac=1e-9)
    sites = find_sites(network, LEVELS)
    table = measure_latency(network, runtime, LEVELS, Workload(8))
    assert table.layers == tuple(site.name for site in sites) == ("conv_a", "conv_b", "gemm_c")
    assert [one.layers for one in table.products] == [(0, 1), (1, 2)]
    assert not table.sparse.any()
    assert set(table.kernels[0]) == {"fake_dense"}
    rng = np.random.default_rng(1)
    for _ in range(12):
        choice = rng.integers(0, len(LEVELS), 3)
        measured = relative(network, sites, runtime, choice, tmp_path)
        assert table.predict(choice) / table.dense_seconds == pytest.approx(measured, rel=1e-3)
    assert table.prediction is not None
    assert table.prediction.largest < 1e-3


def test_networks_without_some_branches_are_predicted(tmp_path: Path) -> None:
    network, runtime = Prepared(two_blocks()), FakeRuntime(seconds_per_mac=1e-9)
    sites = find_sites(network, LEVELS)
    assert [site.kept(LEVELS[-1]) for site in sites] == [4, 0, 4, 0]
    table = measure_latency(network, runtime, LEVELS, Workload(8))
    rng = np.random.default_rng(1)
    for _ in range(20):
        choice = np.where(rng.random(4) < 0.4, len(LEVELS) - 1, rng.integers(0, len(LEVELS), 4))
        measured = relative(network, sites, runtime, choice, tmp_path)
        assert table.predict(choice) / table.dense_seconds == pytest.approx(measured, rel=5e-3, abs=3e-4)
    fastest = table.costs.fastest()
    assert [site.kept(LEVELS[level]) for site, level in zip(sites, fastest, strict=True)] == [4, 0, 4, 0]


def test_what_is_left_of_a_branch_belongs_to_what_was_before_it() -> None:
    """A sum that ran with the last layer of the branch runs with whatever comes before it, or alone."""
    branch = Branch(ends=("b",), sums=("c",), gone=("a", "b"), left=("c",))
    places = Places(("x", "a", "b", "c"), {"x": ("a", "c"), "a": ("b",), "b": ("c",)}, {}, {}, {0: branch})
    whole = Trial((0,), (Row(("x",), 1.0), Row(("a",), 2.0), Row(("b", "c"), 4.0)), 0.0, 1.0, 0.01)
    joined = Trial((1,), (Row(("x", "c"), 1.5),), 0.0, 1.0, 0.01)
    alone = Trial((1,), (Row(("x",), 1.0), Row(("c",), 0.25)), 0.0, 1.0, 0.01)
    assert blocks([whole, joined, alone], places, [[], [0], [0]]) == [
        {("x",): 1.0, ("a",): 2.0, ("b", "c"): 4.0},
        {("x",): 1.5},
        {("x",): 1.0, ("b", "c"): 0.25},
    ]


def test_a_level_pays_from_the_first_that_removes_a_unit(model: onnx.ModelProto) -> None:
    network = Prepared(model)
    table = measure_latency(network, FakeRuntime(seconds_per_mac=1e-9), LEVELS, Workload(8))
    for row, site in enumerate(find_sites(network, LEVELS)):
        assert table.break_even(row) == next(one for one in LEVELS if site.kept(one) < site.kept(LEVELS[0]))


def test_a_budget_is_kept_by_the_table(model: onnx.ModelProto) -> None:
    table = measure_latency(Prepared(model), FakeRuntime(seconds_per_mac=1e-9), LEVELS, Workload(8))
    fastest = table.costs.fastest()
    assert table.costs.total(fastest) == table.costs.total([len(LEVELS) - 1] * 3)
    assert table.highest_speedup == pytest.approx(table.dense_seconds / table.predict(fastest))


def test_it_runs_in_a_real_engine_and_survives_the_disk(model: onnx.ModelProto, tmp_path: Path) -> None:
    with open_runtime("onnxruntime") as runtime:
        table = measure_latency(Prepared(model), runtime, LEVELS, Workload(8), allow_busy=True)
    assert table.highest_speedup >= 1.0
    table.save(tmp_path / "latency.json")
    again = LatencyTable.load(tmp_path / "latency.json")
    for choice in ([0, 0, 0], [5, 9, 30]):
        assert again.predict(choice) == table.predict(choice)


class Dying(FakeRuntime):
    """Its process dies after some networks."""

    left = 20

    def layer_seconds(self, model: Path, workload: Workload, **options: object) -> list[LayerTime]:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise EngineCrashed("fake died during 'layers': killed by SIGKILL")
        return super().layer_seconds(model, workload, **options)  # type: ignore[arg-type]


def test_what_was_measured_before_the_engine_died_is_used(model: onnx.ModelProto, tmp_path: Path) -> None:
    save = tmp_path / "latency.json"
    with pytest.raises(EngineCrashed, match="measured networks are kept"):
        measure_latency(Prepared(model), Dying(), LEVELS, Workload(2), save=save)
    with pytest.raises(ArtifactError, match="levels"):
        measure_latency(Prepared(model), FakeRuntime(), levels_for("unstructured"), Workload(2), save=save)
    table = measure_latency(Prepared(model), FakeRuntime(), LEVELS, Workload(2), save=save)
    expected = measure_latency(Prepared(model), FakeRuntime(), LEVELS, Workload(2))
    np.testing.assert_allclose(table.seconds, expected.seconds)
    assert list(tmp_path.iterdir()) == [save]
