"""Latency tables of networks in int8: beside the dense network in floating point, and by its names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnx_spdy.models import Prepared, narrowed
from onnx_spdy.models.int8.form import FORMS, NoForm
from onnx_spdy.pipeline.latency import measure
from onnx_spdy.pipeline.latency.in_int8 import InInt8
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.site import find_sites
from onnx_spdy.runtimes import LayerTime, Workload, open_runtime
from onnx_spdy.runtimes.fake import FakeRuntime
from tests.models.int8.writing import plain_session
from tests.models.narrowing import network as network_of
from tests.models.narrowing import random_inputs

LEVELS = levels_for("channels+int8")
WIDE = """
g (float[n, 8, 8, 8] x) => (float[n, 4, 8, 8] y)
<float[64, 8, 1, 1] w1, float[64] b1, float[64, 1, 3, 3] w2, float[64] b2, float[4, 64, 1, 1] w3>
{
    [expand] a = Conv (x, w1, b1)
    [relu] r = Relu (a)
    [deep] d = Conv <group = 64, pads = [1, 1, 1, 1]> (r, w2, b2)
    [project] y = Conv (d, w3)
}"""


def keep(network: Prepared, choice: np.ndarray) -> Mapping[str, range]:
    sites = find_sites(network, LEVELS)
    return {site.name: range(site.kept(LEVELS[level])) for site, level in zip(sites, choice, strict=True) if level}


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("graph", ["small", "depthwise"])
def test_narrow_networks_are_written_in_int8_with_grids_of_the_dense_one(
    form: str, graph: str, model: onnx.ModelProto
) -> None:
    network = Prepared(model if graph == "small" else network_of(WIDE))
    inputs = random_inputs(network.proto, batch=4)
    in_int8 = InInt8(network, FORMS[form], Workload(4, inputs=inputs))
    for level in (0, 20, 39):
        choice = np.full(len(find_sites(network, LEVELS)), level)
        narrow = narrowed(network, keep(network, choice)) if level else network.proto
        written = in_int8.written(narrow)
        onnx.checker.check_model(written, full_check=True)
        integers = [t for t in written.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
        assert len(integers) == sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in narrow.graph.node)
        expected, found = (plain_session(one, True).run(None, inputs)[0] for one in (narrow, written))
        if level == 0:  # narrower ones are made for their time alone: other values flow there
            assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_the_unit_is_the_dense_network_in_floating_point(model: onnx.ModelProto, tmp_path: Path) -> None:
    network, runtime = Prepared(model), FakeRuntime(seconds_per_mac=1e-9)
    table = measure_latency(network, runtime, LEVELS, Workload(8))
    onnx.save(model, tmp_path / "dense.onnx")

    def seconds(choice: np.ndarray) -> float:
        narrow = narrowed(network, keep(network, choice)) if choice.any() else network.proto
        onnx.save(InInt8(network, FORMS["fake"], Workload(8)).written(narrow), tmp_path / "int8.onnx")
        with runtime.open(tmp_path / "int8.onnx", Workload(8)) as session:
            return session.seconds(1)[0]

    with runtime.open(tmp_path / "dense.onnx", Workload(8)) as session:
        assert table.dense_seconds == pytest.approx(session.seconds(1)[0])
    assert str(table.levels[0]) == "int8"
    whole = np.zeros(3, int)
    assert table.predict(whole) == pytest.approx(seconds(whole), rel=1e-2)
    assert table.predict(whole) < 0.5 * table.dense_seconds  # which int8 alone brings
    rng = np.random.default_rng(1)
    for _ in range(6):
        choice = rng.integers(0, len(LEVELS), 3)
        assert table.predict(choice) == pytest.approx(seconds(choice), rel=1e-2)
    table.save(tmp_path / "latency.json")
    again = LatencyTable.load(tmp_path / "latency.json")
    assert again.dense_seconds == table.dense_seconds
    assert again.levels == table.levels


def test_int8_gains_over_widths_alone(model: onnx.ModelProto) -> None:
    network, runtime = Prepared(model), FakeRuntime(seconds_per_mac=1e-9)
    plain = measure_latency(network, runtime, levels_for("channels"), Workload(8))
    both = measure_latency(network, runtime, LEVELS, Workload(8))
    assert both.highest_speedup > 1.3 * plain.highest_speedup
    assert both.dense_seconds == pytest.approx(plain.dense_seconds, rel=1e-2)
    assert both.layers == plain.layers


class Watched(FakeRuntime):
    """Keeps what it told."""

    def layer_seconds(self, model: Path, workload: Workload, **options: object) -> list[LayerTime]:  # type: ignore[override]
        rows = super().layer_seconds(model, workload, **options)  # type: ignore[arg-type]
        self.told.extend(rows)
        return rows


def test_what_belongs_to_no_group_has_the_names_of_the_dense_network(model: onnx.ModelProto) -> None:
    runtime = Watched()
    runtime.told = []  # type: ignore[attr-defined]
    table = measure_latency(Prepared(model), runtime, LEVELS, Workload(8))
    own = {name for node in model.graph.node for name in node.output}
    assert any(name.endswith("_quantized") for row in runtime.told for name in row.outputs)  # type: ignore[attr-defined]
    assert {name for _, name, _ in table.rest if name} <= own
    assert set(table.kernels[0]) == {"fake_dense"}


def test_it_runs_in_onnx_runtime(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PROFILE_SECONDS", 0.02)
    monkeypatch.setattr(measure, "ROUNDS_SECONDS", 0.05)
    with open_runtime("onnxruntime") as runtime:
        table = measure_latency(Prepared(model), runtime, LEVELS, Workload(8), allow_busy=True)
    assert table.layers == ("conv_a", "conv_b", "gemm_c")
    assert table.dense_seconds == table.dense.median
    assert 0 < table.predict([39] * 3) <= table.predict([0] * 3)
    own = {name for node in model.graph.node for name in node.output}
    assert {name for _, name, _ in table.rest if name} <= own


def test_a_runtime_without_a_form_is_one_line_and_leaves_nothing(model: onnx.ModelProto, tmp_path: Path) -> None:
    class Other(FakeRuntime):
        name = "deepsparse"

    with pytest.raises(NoForm, match="deepsparse can't be given networks in int8"):
        measure_latency(Prepared(model), Other(), LEVELS, Workload(8), save=tmp_path / "latency.json")
    assert list(tmp_path.iterdir()) == []
