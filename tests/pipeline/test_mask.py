import numpy as np
import pytest
import torch

from onnx_spdy.pipeline.level import BLOCKS, Level, levels_for
from onnx_spdy.pipeline.mask import comes_in_blocks, level_violation, select_mask


@pytest.mark.parametrize("shape", [(16, 24), (8, 12, 3, 3), (5, 7, 3), (6, 10, 1, 1)])
def test_unstructured_zeros_exactly_the_promised_count_of_lowest_scores(shape: tuple[int, ...]) -> None:
    scores = torch.from_numpy(np.random.default_rng(0).random(shape, np.float32))
    for level in levels_for("unstructured"):
        keep = select_mask(scores, level)
        assert int((~keep).sum()) == level.zeros(scores.numel())
        if not bool(keep.all()):
            assert scores[keep].min() >= scores[~keep].max()


def test_ties_do_not_change_the_count() -> None:
    assert int((~select_mask(torch.zeros(10, 10), Level("unstructured", 0.87))).sum()) == 87


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("shape", [(3, 16), (2, 8, 3, 3), (2, 10, 2)])
def test_n_of_m_keeps_the_best_n_of_every_m_input_channels(pattern: str, shape: tuple[int, ...]) -> None:
    scores = torch.from_numpy(np.random.default_rng(1).random(shape, np.float32))
    kept, size = map(int, pattern.split(":"))
    keep = np.moveaxis(select_mask(scores, Level.parse(pattern)).numpy(), 1, -1).reshape(-1, shape[1])
    values = np.moveaxis(scores.numpy(), 1, -1).reshape(-1, shape[1])
    for row, marks in zip(values, keep, strict=True):
        for start in range(0, shape[1], size):
            group = row[start : start + size]
            best = np.argsort(group)[::-1][:kept]
            assert set(np.flatnonzero(marks[start : start + size])) == set(best)


def test_block4_removes_whole_runs_of_four_input_channels() -> None:
    scores = torch.from_numpy(np.random.default_rng(2).random((4, 18, 3, 3), np.float32))
    level = Level("block4", 0.6)
    keep = np.moveaxis(select_mask(scores, level).numpy(), 1, -1)
    runs = np.pad(keep, [(0, 0)] * 3 + [(0, 2)], mode="edge").reshape(4, 3, 3, 5, 4)
    assert ((runs.sum(-1) == 0) | (runs.sum(-1) == 4)).all()
    assert int((runs.sum(-1) == 0).sum()) == level.zeros(4 * 9 * 5)


@pytest.mark.parametrize("outputs", [2, 4, 8])
def test_blockout_removes_the_lightest_inputs_of_neighbouring_output_channels(outputs: int) -> None:
    scores = torch.from_numpy(np.random.default_rng(2).random((11, 6, 3), np.float32))
    level = Level(f"blockout{outputs}", 0.6)
    keep = select_mask(scores, level)
    sums, kept = [], []
    for first in range(0, 11, outputs):
        block = keep[first : first + outputs]
        assert torch.equal(block.any(0), block.all(0))
        sums.append(scores[first : first + outputs].sum(0))
        kept.append(block.all(0))
    total, marks = torch.stack(sums), torch.stack(kept)
    assert int((~marks).sum()) == level.zeros(marks.numel())
    assert total[marks].min() >= total[~marks].max()
    assert level_violation(torch.where(keep, scores, 0.0), level) is None
    assert "blocks are zero, it promises" in (level_violation(scores, level) or "")
    found = [name for name in BLOCKS if comes_in_blocks(torch.where(keep, scores, 0.0).numpy(), name)]
    assert found == [
        name for name in ("unstructured", "blockout2", "blockout4", "blockout8") if BLOCKS[name][0] <= outputs
    ]
