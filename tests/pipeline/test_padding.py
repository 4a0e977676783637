"""What stands at padding decides nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnx_spdy.models import export_module, prepare
from onnx_spdy.pipeline.correct import StatisticsCorrection
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.hessian import collect_hessians
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.padding import Padding
from onnx_spdy.pipeline.training.dense_outputs import Capture
from tests.encoder import encoder, sentences

MASK = np.array([[1, 1, 0], [1, 0, 0]])


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(prepare(export_module(*encoder())))


def samples(padding: int = 0, count: int = 64) -> Samples:
    return Samples(sentences(count, padding=padding))


def test_rows_of_padding_are_left_out_and_its_values_are_zero() -> None:
    padding = Padding({"ids": MASK, "attention_mask": MASK})
    values = torch.arange(12.0).view(2, 3, 2) + 1
    assert padding.real_rows(values).tolist() == [[1, 2], [3, 4], [7, 8]]
    assert padding.zeroed(values).tolist() == [[[1, 2], [3, 4], [0, 0]], [[7, 8], [0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("name", "mask", "shape"),
    [
        ("mask_token_ids", MASK, (2, 3, 2)),
        ("attention_mask", MASK * 2, (2, 3, 2)),  # not zeros and ones
        ("attention_mask", MASK * 0, (2, 3, 2)),  # nothing would be left
        ("attention_mask", MASK, (2, 3)),  # may be classes
        ("attention_mask", MASK, (2, 4, 3)),
    ],
)
def test_other_inputs_and_other_shapes_leave_values_alone(name: str, mask: np.ndarray, shape: tuple[int, ...]) -> None:
    values = torch.rand(shape)
    padding = Padding({name: mask})
    assert padding.real_rows(values) is values
    assert padding.zeroed(values) is values


@pytest.mark.parametrize(
    ("shape", "positions_at"),
    [
        ((2, 3, 5), 1), ((2, 3, 4, 5), 1), ((2, 4, 3, 5), 2), ((2, 3, 3, 5), 2), ((2, 4, 3, 3), 2), ((2, 5, 3), 2),
    ],
)  # fmt: skip
def test_positions_are_found_on_their_axis(shape: tuple[int, ...], positions_at: int) -> None:
    values = torch.rand(shape) + 1
    expected = values.clone()
    for sample, position in ((0, 2), (1, 1), (1, 2)):
        expected[sample].select(positions_at - 1, position).zero_()
        values[sample].select(positions_at - 1, position).fill_(torch.nan)
    padding = Padding({"attention_mask": MASK})
    assert torch.equal(padding.zeroed(values), expected)
    if positions_at < len(shape) - 1:
        rows = padding.real_rows(values)
        assert rows.shape == (3 * values.numel() // (6 * shape[-1]), shape[-1])
        assert rows.isfinite().all()


def test_samples_and_positions_may_be_one_axis_or_swapped_or_repeated_for_heads() -> None:
    padding, real = Padding({"attention_mask": MASK}), torch.from_numpy(MASK == 1)
    flat = torch.where(real.flatten()[:, None], torch.rand(6, 4) + 1, torch.nan)
    assert torch.equal(padding.real_rows(flat), flat[real.flatten()])
    assert torch.equal(padding.zeroed(flat), flat.nan_to_num())
    swapped = flat.view(2, 3, 4).transpose(0, 1)
    assert torch.equal(padding.zeroed(swapped), swapped.nan_to_num())
    heads = flat.view(2, 1, 3, 4).expand(2, 5, 3, 4).reshape(10, 3, 4)
    assert torch.equal(padding.zeroed(heads), heads.nan_to_num())


def test_two_axes_are_positions_where_only_padding_has_no_values() -> None:
    padding, real = Padding({"attention_mask": MASK}), torch.from_numpy(MASK == 1)
    starts = torch.where(real, torch.ones(2, 3), -torch.inf)
    assert torch.equal(padding.zeroed(starts), real.float())
    wrong = torch.where(real, torch.inf, 1.0)
    assert padding.zeroed(wrong) is wrong


@pytest.mark.parametrize("low", [-np.inf, -1e4, np.finfo("f4").min])
@pytest.mark.parametrize("axes", [(), (1,), (1, 1), (1, 3), (3,)])
def test_a_mask_that_is_added_to_scores_tells_padding_too(low: float, axes: tuple[int, ...]) -> None:
    added = np.where(MASK == 1, 0, low).astype("f4").reshape(2, *[1] * len(axes), 3)
    added = np.broadcast_to(added, (2, *axes, 3)).copy()
    if axes[-1:] == (3,):
        added[..., ~np.tril(np.ones((3, 3), bool))] = low  # causal as well
    values = torch.rand(2, 3, 4)
    plain = Padding({"attention_mask": MASK}).real_rows(values)
    assert torch.equal(Padding({"scores_mask": added}).real_rows(values), plain)


def test_hessians_are_those_of_the_tokens_alone(network: Network) -> None:
    found = collect_hessians(network, network.layers, samples())
    layer = network.layers[0]
    seen = []
    hook = network.graph.node(layer.name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.run(samples())
    hook.remove()
    tokens = seen[0][torch.from_numpy(samples().inputs["attention_mask"] == 1)].double()
    torch.testing.assert_close(found[layer.name], tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-6)
    for other in collect_hessians(network, network.layers, samples(padding=7)).values():
        torch.testing.assert_close(other, found.pop(next(iter(found))), rtol=1e-4, atol=1e-6)


def test_the_token_that_fills_up_changes_neither_outputs_nor_statistics(network: Network) -> None:
    corrected = []
    for padding in (0, 7):
        correction = StatisticsCorrection(network, samples(padding))
        smaller = {layer.weight: network.dense(layer.weight) * 0.8 for layer in network.layers}
        corrected.append(correction.apply(smaller, network.layers))
    torch.testing.assert_close(corrected[0], corrected[1], rtol=1e-3, atol=1e-5)
    network.load({})
    with Capture(network, network.layers) as capture, torch.inference_mode():
        one, other = capture(samples(0, 8)), capture(samples(7, 8))
    assert len(one) == len(network.layers) + 2
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)  # in bfloat16 where the CPU has it
    assert (one["output_0"][samples(count=8).inputs["attention_mask"] == 0] == 0).all()
