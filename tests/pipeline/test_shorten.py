"""What all samples have of padding is cut off, where the network computes the same without it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from onnx_spdy.models import export_module, prepare
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.hessian import collect_hessians
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.shorten import shortened
from tests.encoder import LENGTH, Encoder, encoder, sentences

OPEN = {name: {1: "positions"} for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(prepare(export_module(*encoder(), OPEN)))


def longest(samples: Samples) -> int:
    return int(samples.inputs["attention_mask"].sum(1).max())


def test_all_that_anyone_uses_is_left(network: Network) -> None:
    samples = Samples(sentences(64), np.arange(64))
    found = shortened(network, samples)
    assert longest(samples) < LENGTH
    assert all(array.shape == (64, longest(samples)) for array in found.inputs.values())
    assert (found.target == samples.target).all()
    with torch.inference_mode():
        expected, outputs = network.run(samples), network.run(found)
    for name, values in outputs.items():
        whole = expected[name][:, : values.shape[1]] if values.ndim == 3 else expected[name]
        torch.testing.assert_close(values, whole)


def test_hessians_stay_what_they_are(network: Network) -> None:
    samples = Samples(sentences(64))
    some = network.layers[:3]
    expected = collect_hessians(network, some, samples)
    found = collect_hessians(network, some, shortened(network, samples))
    for name, hessian in expected.items():
        torch.testing.assert_close(found[name], hessian, rtol=1e-4, atol=1e-5 * float(hessian.abs().max()))


def test_samples_stay_whole_where_one_fills_its_length(network: Network) -> None:
    samples = Samples(sentences(64))
    samples.inputs["attention_mask"][5] = 1
    assert shortened(network, samples) is samples


def test_a_target_for_each_position_keeps_all_of_them(network: Network) -> None:
    samples = Samples(sentences(64), np.zeros((64, LENGTH)))
    assert shortened(network, samples) is samples


def test_a_network_of_one_length_gets_it() -> None:
    samples = Samples(sentences(8))
    assert shortened(Network(prepare(export_module(*encoder()))), samples) is samples


def test_a_network_that_reads_its_padding_gets_it() -> None:
    class Careless(Encoder):
        """Takes the mean over all positions."""

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            (states,) = super().forward(input_ids, attention_mask)
            return (states.mean(1),)

    torch.manual_seed(0)
    careless = Careless(embedding=False).eval()
    samples = Samples(sentences(8))
    assert shortened(Network(prepare(export_module(careless, encoder()[1], OPEN))), samples) is samples


def test_samples_without_a_mask_stay_whole(network: Network) -> None:
    samples = Samples(sentences(8))
    assert shortened(network, replace(samples, inputs={"input_ids": samples.inputs["input_ids"]})).inputs[
        "input_ids"
    ].shape == (8, LENGTH)
