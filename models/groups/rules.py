"""What is done at each operator; one that isn't here isn't understood, and nothing that it reads can shrink.

To add one: write a function from the trace and a step to the factors of the step's outputs, in the file of its family,
and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx_spdy.models.groups import elementwise, moves, normalise, products
from onnx_spdy.models.groups.elementwise import Outputs
from onnx_spdy.models.groups.trace import Step, Trace

Rule = Callable[[Trace, Step], Outputs]

ELEMENTWISE = (
    "Abs", "And", "Cast", "Ceil", "Celu", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round",
    "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
    "Where", "Xor",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise.elementwise),
    **dict.fromkeys(("Add", "Mean", "Sub", "Sum"), elementwise.addition),
    **dict.fromkeys(("CastLike", "Clip", "Dropout"), elementwise.first_alone),
    "Conv": products.conv,
    "ConvTranspose": products.conv_transpose,
    "Gemm": products.gemm,
    "MatMul": products.matmul,
    "Concat": moves.concat,
    "DepthToSpace": moves.depth_to_space,
    "Expand": moves.expand,
    **dict.fromkeys(("Flatten", "Squeeze", "Unsqueeze"), moves.reshape_by_rule),
    "Gather": moves.gather,
    "Reshape": moves.reshape,
    "Shape": moves.shape_of,
    "Slice": moves.slicing,
    "Split": moves.split,
    "Tile": moves.tile,
    "Transpose": moves.transpose,
    **dict.fromkeys(("ArgMax", "ArgMin"), normalise.arg_reduce),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"), normalise.pool),
    "BatchNormalization": normalise.batch_norm,
    **dict.fromkeys(("CumSum", "Hardmax", "LogSoftmax", "LpNormalization", "Softmax"), normalise.along_axis),
    "GroupNormalization": normalise.group_norm,
    "InstanceNormalization": normalise.instance_norm,
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), normalise.layer_norm),
    "Pad": normalise.pad,
    **dict.fromkeys(
        (
            "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
            "ReduceProd", "ReduceSum", "ReduceSumSquare",
        ),
        normalise.reduce,
    ),
    **dict.fromkeys(("Resize", "Upsample"), normalise.resize),
}  # fmt: skip


def not_understood(trace: Trace, step: Step) -> Outputs:
    """What an operator without a rule does."""
    return moves.frozen(trace, step, "which isn't understood")
