"""Sums over patches from shifts, against the unfolded patches in float64."""

from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from onnx_spdy.models import InputPatches, Layer
from onnx_spdy.pipeline.database.patch_products import SHIFTS, WHOLE, PatchProducts

CASES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [  # kernel, sizes of the input, attributes
    ((3, 3), (12, 10), {"pads": [1, 1, 1, 1]}),
    ((3, 3), (12, 10), {}),
    ((3, 3), (4, 4), {"pads": [1, 1, 1, 1]}),
    ((3, 5), (14, 13), {"pads": [0, 1, 2, 4]}),
    ((3, 3), (9, 9), {"pads": [3, 0, 4, 1]}),  # more padding than a patch can reach over
    ((3, 3), (14, 15), {"pads": [2, 2, 2, 2], "dilations": [2, 3]}),
    ((2, 4), (11, 12), {"auto_pad": "SAME_UPPER"}),
    ((2, 4), (11, 12), {"auto_pad": "SAME_LOWER"}),
    ((5,), (40,), {"pads": [1, 2]}),
    ((3, 3, 3), (7, 6, 8), {"pads": [1, 1, 1, 1, 0, 1]}),
]


def convolution(kernel: tuple[int, ...], sizes: tuple[int, ...], attributes: dict[str, Any]) -> InputPatches:
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, *sizes])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(torch.zeros(2, 5, *kernel).numpy(), "w")],
    )
    return InputPatches(helper.make_model(graph), Layer("conv", "Conv", "w", None, "y", (2, 5, *kernel), False, None))


def canonical(patches: InputPatches, matrix: torch.Tensor) -> torch.Tensor:
    """(d, d) over patches, whose channels come last, -> (d, d) over `weight.flatten(1)`, that is (in, *kernel)."""
    order = torch.arange(len(matrix)).view(-1, patches.channels).T.flatten()
    return matrix[order][:, order]


@pytest.mark.parametrize(("kernel", "sizes", "attributes"), CASES)
def test_shifts_and_frame_give_the_sum_over_all_patches(
    monkeypatch: pytest.MonkeyPatch, kernel: tuple[int, ...], sizes: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    monkeypatch.setattr(PatchProducts, "_shifts_pay", lambda self, x: True)
    patches = convolution(kernel, sizes, attributes)
    x = torch.randn(3, 5, *sizes, generator=torch.Generator().manual_seed(0)) + 0.3
    unfolded = patches(x).double()
    products = PatchProducts(patches)
    assert products.count(x) == len(unfolded)
    parts = dict(products(x))
    assert SHIFTS in parts
    expected = canonical(patches, unfolded.T @ unfolded)
    torch.testing.assert_close(products.matrix(parts), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize(
    ("sizes", "attributes", "pay"),
    [
        ((20, 20), {"pads": [1, 1, 1, 1]}, True),
        ((20, 20), {"pads": [1, 1, 1, 1], "strides": [2, 2]}, False),
        ((3, 3), {}, False),  # one position: everything else would be frame
        ((1, 20), {"pads": [1, 1, 1, 1]}, False),  # kernel positions that only ever meet padding are exact zeros
    ],
)
def test_shifts_are_taken_where_they_save_work(sizes: tuple[int, ...], attributes: dict[str, Any], pay: bool) -> None:
    patches = convolution((3, 3), sizes, attributes)
    x = torch.randn(2, 5, *sizes, generator=torch.Generator().manual_seed(0))
    parts = dict(PatchProducts(patches)(x))
    assert set(parts) >= ({SHIFTS} if pay else {WHOLE})
    unfolded = patches(x)
    found, expected = PatchProducts(patches).matrix(parts), canonical(patches, unfolded.T @ unfolded).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert bool((found[expected == 0] == 0).all())


def test_inputs_that_a_kernel_position_meets_in_the_frame_only_are_exact_zeros() -> None:
    """As of a channel that is alive in a corner of the image: what the subtraction leaves must not be negative."""
    patches = convolution((3, 3), (12, 12), {"pads": [1, 1, 1, 1]})
    x = torch.randn(40, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0
    x[:, 1, 0, 0] = torch.linspace(0.1, 1, 40)
    parts = dict(PatchProducts(patches)(x))
    assert SHIFTS in parts
    unfolded = patches(x).double()
    found, expected = PatchProducts(patches).matrix(parts), canonical(patches, unfolded.T @ unfolded)
    assert bool((expected.diagonal() == 0).any())
    assert bool((found[expected.diagonal() == 0] == 0).all())
    assert bool((found[:, expected.diagonal() == 0] == 0).all())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
