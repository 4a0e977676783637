"""What stands at padding decides nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnx_spdy.models import Prepared, export_module, prepare
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
    return Network(Prepared(prepare(export_module(*encoder()))))


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
