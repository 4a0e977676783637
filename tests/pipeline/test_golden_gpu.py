"""What was measured on a real GPU, as the search reads it: where 2:4 gains and where it doesn't."""

from pathlib import Path

import numpy as np
import pytest

from onnx_spdy.pipeline.latency.table import LatencyTable

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "h200_bf16"


@pytest.mark.parametrize(
    ("name", "gaining", "highest"), [("resnet18_160px_batch64", 3, 1.04), ("minilm_l6_128_batch64", 0, 1.0)]
)
def test_the_tables_of_an_h200_say_which_layers_gain(name: str, gaining: int, highest: float) -> None:
    table = LatencyTable.load(GOLDEN / f"{name}.json")
    assert table.environment.cpu == "NVIDIA H200"
    assert dict(table.environment.options)["fusion"] == "torch.compile"
    seconds = np.asarray(table.seconds)
    dense = [str(level) for level in table.levels].index("dense")
    assert (seconds[:, dense] > 0).all()
    assert int((seconds.min(axis=1) < 0.99 * seconds[:, dense]).sum()) == gaining
    assert table.highest_speedup == pytest.approx(highest, abs=0.01)
