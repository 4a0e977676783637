"""The network: read an ONNX graph, run it in PyTorch, find its prunable layers, write weights back."""

from onnx_spdy.models.export import export_module
from onnx_spdy.models.graph import (
    ModelError,
    UnsupportedOperator,
    check_interface,
    fixed_batch,
    input_axes,
    input_dtypes,
    input_shapes,
    model_sha256,
    node_names,
    save_model,
)
from onnx_spdy.models.groups import Group, GroupError, find_groups
from onnx_spdy.models.layers import Layer, find_layers, from_canonical, to_canonical
from onnx_spdy.models.load import load_model
from onnx_spdy.models.narrow import masked, narrowed, removed_indices
from onnx_spdy.models.patches import InputPatches
from onnx_spdy.models.prepare import prepare
from onnx_spdy.models.prepared import Prepared
from onnx_spdy.models.torch_graph import Suspended, TorchGraph
from onnx_spdy.models.write_back import changed_initializers, differences, write_weights
from onnx_spdy.models.write_module import write_module

__all__ = [
    "Group",
    "GroupError",
    "InputPatches",
    "Layer",
    "ModelError",
    "Prepared",
    "Suspended",
    "TorchGraph",
    "UnsupportedOperator",
    "changed_initializers",
    "check_interface",
    "differences",
    "export_module",
    "find_groups",
    "find_layers",
    "fixed_batch",
    "from_canonical",
    "input_axes",
    "input_dtypes",
    "input_shapes",
    "load_model",
    "masked",
    "model_sha256",
    "narrowed",
    "node_names",
    "prepare",
    "removed_indices",
    "save_model",
    "to_canonical",
    "write_module",
    "write_weights",
]
