"""The operators that TorchGraph can run, by ONNX name (domain `ai.onnx`).

To add one: write a function in the file of its family that takes a `Node` and returns the function from the node's
input tensors to its output, and add a line to `OPERATORS`. The ONNX backend tests of `tests/models` then run on it by
themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from onnx_spdy.models.operators import (
    activation,
    arithmetic,
    conv,
    indexing,
    linear,
    normalisation,
    padding,
    pooling,
    reduction,
    resize,
    shape,
)
from onnx_spdy.models.operators.operator import Node, Operator, read_node, read_tensor, simple

__all__ = ["OPERATORS", "Node", "Operator", "read_node", "read_tensor"]


def _host(*positions: int) -> frozenset[int]:
    return frozenset(positions)


OPERATORS: dict[str, Operator] = {
    # convolution, matrix products
    "Conv": Operator(conv.conv),
    "ConvTranspose": Operator(conv.conv_transpose),
    "Gemm": Operator(linear.gemm),
    "MatMul": simple(torch.matmul),
    "Einsum": Operator(linear.einsum),
    # pooling
    "MaxPool": Operator(pooling.max_pool),
    "AveragePool": Operator(pooling.average_pool),
    "GlobalAveragePool": simple(pooling.global_average_pool),
    "GlobalMaxPool": simple(pooling.global_max_pool),
    # normalisation
    "BatchNormalization": Operator(normalisation.batch_normalization, statistics=frozenset({3, 4})),
    "InstanceNormalization": Operator(normalisation.instance_normalization),
    "LayerNormalization": Operator(normalisation.layer_normalization),
    "RMSNormalization": Operator(normalisation.rms_normalization),
    "GroupNormalization": Operator(normalisation.group_normalization),
    "LpNormalization": Operator(normalisation.lp_normalization),
    "LRN": Operator(normalisation.lrn),
    "MeanVarianceNormalization": Operator(normalisation.mean_variance_normalization),
    # activation
    "Relu": simple(torch.relu),
    "LeakyRelu": Operator(activation.leaky_relu),
    "PRelu": Operator(activation.prelu),
    "Elu": Operator(activation.elu),
    "Selu": Operator(activation.selu),
    "Celu": Operator(activation.celu),
    "ThresholdedRelu": Operator(activation.thresholded_relu),
    "Sigmoid": simple(torch.sigmoid),
    "HardSigmoid": Operator(activation.hard_sigmoid),
    "HardSwish": simple(F.hardswish),
    "Mish": simple(F.mish),
    "Swish": Operator(activation.swish),
    "Gelu": Operator(activation.gelu),
    "Tanh": simple(torch.tanh),
    "Softplus": simple(F.softplus),
    "Softsign": simple(F.softsign),
    "Softmax": Operator(activation.softmax),
    "LogSoftmax": Operator(activation.log_softmax),
    "Clip": Operator(activation.clip, host=_host(1, 2)),
    "Dropout": Operator(activation.dropout, host=_host(1, 2)),
    # arithmetic
    "Add": simple(torch.add),
    "Sub": simple(torch.sub),
    "Mul": simple(torch.mul),
    "Div": simple(arithmetic.div),
    "Pow": Operator(lambda node: arithmetic.power, host=_host(1)),
    "Mod": Operator(arithmetic.mod),
    "Max": simple(arithmetic.maximum),
    "Min": simple(arithmetic.minimum),
    "Sum": simple(arithmetic.total),
    "Mean": simple(arithmetic.mean),
    "Abs": simple(torch.abs),
    "Neg": simple(torch.neg),
    "Sign": simple(torch.sign),
    "Sqrt": simple(torch.sqrt),
    "Reciprocal": simple(torch.reciprocal),
    "Exp": simple(torch.exp),
    "Log": simple(torch.log),
    "Erf": simple(torch.erf),
    "Sin": simple(torch.sin),
    "Cos": simple(torch.cos),
    "Floor": simple(torch.floor),
    "Ceil": simple(torch.ceil),
    "Round": simple(arithmetic.round_half_even),
    # comparison, logic, type
    "Equal": simple(torch.eq),
    "Greater": simple(torch.gt),
    "GreaterOrEqual": simple(torch.ge),
    "Less": simple(torch.lt),
    "LessOrEqual": simple(torch.le),
    "And": simple(torch.logical_and),
    "Or": simple(torch.logical_or),
    "Xor": simple(torch.logical_xor),
    "Not": simple(torch.logical_not),
    "Where": simple(arithmetic.where),
    "IsNaN": simple(torch.isnan),
    "IsInf": Operator(arithmetic.is_inf),
    "Cast": Operator(arithmetic.cast),
    "CastLike": simple(arithmetic.cast_like),
    # reduction
    "ReduceMean": reduction.reduction(reduction.mean),
    "ReduceSum": reduction.reduction(reduction.total, axes_input_since=13),
    "ReduceMax": reduction.reduction(reduction.largest),
    "ReduceMin": reduction.reduction(reduction.smallest),
    "ReduceProd": reduction.reduction(reduction.product),
    "ReduceL1": reduction.reduction(reduction.l1),
    "ReduceL2": reduction.reduction(reduction.l2),
    "ReduceSumSquare": reduction.reduction(reduction.sum_square),
    "ReduceLogSum": reduction.reduction(reduction.log_sum),
    "ReduceLogSumExp": reduction.reduction(reduction.log_sum_exp),
    "ArgMax": Operator(reduction.arg_max),
    "ArgMin": Operator(reduction.arg_min),
    "TopK": Operator(reduction.top_k, host=_host(1)),
    "CumSum": Operator(reduction.cum_sum, host=_host(1)),
    # shape
    "Shape": Operator(shape.shape),
    "Size": simple(shape.size),
    "Identity": simple(shape.identity),
    "Reshape": Operator(shape.reshape, host=_host(1)),
    "Flatten": Operator(shape.flatten),
    "Transpose": Operator(shape.transpose),
    "Squeeze": Operator(shape.squeeze, host=_host(1)),
    "Unsqueeze": Operator(shape.unsqueeze, host=_host(1)),
    "Expand": Operator(lambda node: shape.expand, host=_host(1)),
    "Tile": Operator(lambda node: shape.tile, host=_host(1)),
    "DepthToSpace": Operator(shape.depth_to_space),
    "SpaceToDepth": Operator(shape.space_to_depth),
    "ConstantOfShape": Operator(shape.constant_of_shape, host=_host(0)),
    "Range": Operator(lambda node: shape.arange, host=_host(0, 1, 2)),
    "EyeLike": Operator(shape.eye_like),
    # parts
    "Concat": Operator(indexing.concat),
    "Split": Operator(indexing.split, host=_host(1)),
    "Slice": Operator(indexing.slice_, host=_host(1, 2, 3, 4)),
    "Gather": Operator(indexing.gather),
    "GatherElements": Operator(indexing.gather_elements),
    "GatherND": Operator(indexing.gather_nd),
    "ScatterND": Operator(indexing.scatter_nd),
    "ScatterElements": Operator(indexing.scatter_elements),
    "OneHot": Operator(indexing.one_hot, host=_host(1)),
    "NonZero": simple(indexing.non_zero),
    "Trilu": Operator(indexing.trilu, host=_host(1)),
    "Pad": Operator(padding.pad, host=_host(1, 2, 3)),
    "Resize": Operator(resize.resize, host=_host(1, 2, 3)),
    "Upsample": Operator(resize.upsample, host=_host(1)),
}
