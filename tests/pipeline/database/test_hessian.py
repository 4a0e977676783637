import numpy as np
import torch

from onnx_spdy.models import to_canonical
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.hessian import collect_hessians, squared_error
from onnx_spdy.pipeline.network import Network


def layer_io(network: Network, samples: Samples) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    hooks = [
        network.graph.node(layer.name).register_forward_hook(
            lambda module, inputs, output, name=layer.name: found.__setitem__(name, (inputs[0], output))
        )
        for layer in network.layers
    ]
    network.run(samples)
    for hook in hooks:
        hook.remove()
    return found


def test_quadratic_form_equals_the_real_output_error_of_every_kind_of_layer(network: Network, samples: Samples) -> None:
    hessians = collect_hessians(network, network.layers, samples)
    before = layer_io(network, samples)
    rng = np.random.default_rng(0)
    for layer in network.layers:
        dense = network.dense(layer.weight)
        changed = dense + torch.from_numpy(rng.normal(0, 0.1, dense.shape).astype(np.float32))
        module = network.graph.node(layer.name)
        inputs, output = before[layer.name]
        arguments = [changed] + ([network.dense(layer.bias)] if layer.op != "MatMul" else [])
        difference = module(inputs, *arguments) - output
        expected = float(difference.double().square().sum()) / (difference.numel() / layer.shape[0])
        change = to_canonical(layer, (changed - dense).numpy())
        found = squared_error(torch.from_numpy(np.ascontiguousarray(change)).flatten(1).double(), hessians[layer.name])
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_batches_do_not_matter(network: Network, samples: Samples) -> None:
    whole = collect_hessians(network, network.layers, samples)
    network.batch_size = lambda wanted=7: 7  # type: ignore[method-assign]
    parts = collect_hessians(network, network.layers, samples)
    for name, hessian in whole.items():
        torch.testing.assert_close(parts[name], hessian, rtol=1e-4, atol=1e-6)


def test_progress_counts_the_samples(network: Network, samples: Samples) -> None:
    seen = []
    collect_hessians(network, network.layers[:1], samples, lambda done, total, note: seen.append((done, total)))
    assert seen[-1] == (96, 96)
