"""What scikit-learn's converter writes around the matrix products of a network (domain `ai.onnx.ml`)."""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node, read_tensor


def array_feature_extractor(values: Tensor, columns: Tensor) -> Tensor:
    columns = columns.flatten()
    return values[columns].reshape(1, -1) if values.dim() == 1 else values[..., columns]


def binarizer(node: Node) -> Compute:
    threshold = node.get("threshold", 0.0)
    return lambda x: (x > threshold).to(x.dtype)


def scaler(node: Node) -> Compute:
    offset, scale = torch.tensor(node.get("offset")), torch.tensor(node.get("scale"))  # one value, or one a column
    return lambda x: (x.float() - offset.to(x.device)) * scale.to(x.device)


def normalizer(node: Node) -> Compute:
    order = {"MAX": float("inf"), "L1": 1.0, "L2": 2.0}.get(node.get("norm", "MAX"))
    if order is None:
        raise node.unsupported(f"norm {node.get('norm')!r}")

    def run(x: Tensor) -> Tensor:
        x = x.float()
        largest = x.amax(-1, keepdim=True)  # MAX is the largest value, not the largest absolute one
        norm = largest if order == float("inf") else torch.linalg.vector_norm(x, order, -1, keepdim=True)
        return x / torch.where(norm == 0, torch.ones_like(norm), norm)

    return run


def label_encoder(node: Node) -> Compute:
    """Numbers to numbers; PyTorch has no text."""
    keys, values = _labels(node, "keys"), _labels(node, "values")
    if isinstance(node.get("default_tensor"), TensorProto):
        default = read_tensor(node.get("default_tensor")).flatten()[0]
    else:
        default = torch.tensor(
            node.get("default_float", -0.0) if values.is_floating_point() else node.get("default_int64", -1)
        )

    def run(x: Tensor) -> Tensor:
        equal = x[..., None] == keys.to(x.device)
        if keys.is_floating_point():
            equal |= x[..., None].isnan() & keys.to(x.device).isnan()
        found = values.to(x.device)[equal.int().argmax(-1)]
        return torch.where(equal.any(-1), found, default.to(found))

    return run


def _labels(node: Node, which: str) -> Tensor:
    if isinstance(tensor := node.get(f"{which}_tensor"), TensorProto):
        return read_tensor(tensor)
    for kind, dtype in (("int64s", torch.int64), ("floats", torch.float32)):
        if node.get(f"{which}_{kind}") is not None:
            return torch.tensor(node.get(f"{which}_{kind}"), dtype=dtype)
    raise node.unsupported("labels that are text")
