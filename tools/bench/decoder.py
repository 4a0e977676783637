"""A decoder of any size with random weights, as exporters write it: the graph in one file, its weights in another.

Weights are drawn and written one by one, so a network takes no more memory than its largest tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHT_SCALE = 0.02  # standard deviation, as decoders are initialised
ALIGNMENT = 4096  # of each tensor in the file of weights: a page
OPSET, IR_VERSION = 18, 9


@dataclass(frozen=True)
class DecoderSize:
    """The widths of a decoder like OPT: learned positions, ReLU, biases, a head that shares nothing.

    Source: Zhang et al., OPT (2022), Table 1.
    """

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    vocabulary: int = 32_000
    sequence: int = 128

    @property
    def weights(self) -> int:
        """Of all linear layers and embeddings."""
        block = 4 * self.hidden**2 + 2 * self.hidden * self.feed_forward
        return self.layers * block + (2 * self.vocabulary + self.sequence) * self.hidden


SIZES = {
    "tiny": DecoderSize(2, 64, 4, 256, vocabulary=512, sequence=16),
    "125m": DecoderSize(12, 768, 12, 3072),
    "350m": DecoderSize(24, 1024, 16, 4096),
    "1.3b": DecoderSize(24, 2048, 32, 8192),
}


def write_decoder(size: DecoderSize, path: Path, seed: int = 0) -> None:
    """Write a decoder to `path`, and its weights to `<name>.data` beside it.

    Input `input_ids` (batch, sequence) int64, output `logits` (batch, sequence, vocabulary).
    """
    rng = np.random.default_rng(seed)
    decoder = _Decoder(size)
    decoder.build()
    with path.with_name(f"{path.name}.data").open("wb") as stream:
        stored = [_written(name, shape, rng, stream, path) for name, shape in decoder.weights.items()]
    values = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", size.sequence]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", size.sequence, size.vocabulary]),
    ]
    numbers = [numpy_helper.from_array(array, name) for name, array in decoder.numbers.items()]
    graph = helper.make_graph(decoder.nodes, "decoder", values[:1], values[1:], [*numbers, *stored])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString())


def _written(name: str, shape: Sequence[int], rng: np.random.Generator, stream, path: Path) -> TensorProto:
    """The tensor's values, appended to the stream; and what refers to them."""
    values = rng.standard_normal(shape, np.float32)
    values *= WEIGHT_SCALE
    if name.endswith("norm.weight"):
        values += 1
    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    places = {"location": f"{path.name}.data", "offset": stream.tell(), "length": values.nbytes}
    for key, value in places.items():
        tensor.external_data.add(key=key, value=str(value))
    stream.write(values.data)
    return tensor


class _Decoder:
    """The nodes of a decoder.

    Attributes:
        nodes: in order.
        weights: name -> shape, in the order of their use.
        numbers: name -> values of small constants.
    """

    def __init__(self, size: DecoderSize) -> None:
        self._size = size
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, tuple[int, ...]] = {}
        self.numbers: dict[str, np.ndarray] = {}

    def build(self) -> None:
        """Add the whole decoder."""
        size = self._size
        ahead = np.triu(np.full((size.sequence, size.sequence), -1e9, np.float32), 1)
        self.numbers["mask"] = ahead[None, None]
        self.numbers["scale"] = np.float32((size.hidden // size.heads) ** -0.5)
        self.numbers["split"] = np.array([0, size.sequence, size.heads, size.hidden // size.heads])
        self.numbers["join"] = np.array([0, size.sequence, size.hidden])
        tokens = self._add("Gather", self._weight("tokens", size.vocabulary, size.hidden), "input_ids", name="embed")
        states = self._add("Add", tokens, self._weight("positions", size.sequence, size.hidden), name="place")
        for number in range(size.layers):
            states = self._block(f"layers.{number}", states)
        states = self._norm("final_norm", states)
        head = self._weight("head.weight", size.hidden, size.vocabulary)
        self._add("MatMul", states, head, name="head", output="logits")

    def _block(self, name: str, states: str) -> str:
        hidden, wide = self._size.hidden, self._size.feed_forward
        normed = self._norm(f"{name}.attention_norm", states)
        query, key, value = (
            self._heads(f"{name}.{part}", self._linear(f"{name}.{part}", normed, hidden, hidden), turned)
            for part, turned in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
        )
        scores = self._add("Mul", self._add("MatMul", query, key, name=f"{name}.scores"), "scale", name=f"{name}.scale")
        masked = self._add("Add", scores, "mask", name=f"{name}.mask")
        mixed = self._add("MatMul", self._add("Softmax", masked, name=f"{name}.softmax"), value, name=f"{name}.mix")
        turned = self._add("Transpose", mixed, name=f"{name}.turn", perm=[0, 2, 1, 3])
        joined = self._add("Reshape", turned, "join", name=f"{name}.join")
        states = self._add("Add", states, self._linear(f"{name}.out", joined, hidden, hidden), name=f"{name}.residual")
        normed = self._norm(f"{name}.feed_forward_norm", states)
        inner = self._add("Relu", self._linear(f"{name}.up", normed, hidden, wide), name=f"{name}.relu")
        return self._add("Add", states, self._linear(f"{name}.down", inner, wide, hidden), name=f"{name}.residual2")

    def _heads(self, name: str, states: str, perm: Sequence[int]) -> str:
        split = self._add("Reshape", states, "split", name=f"{name}.split")
        return self._add("Transpose", split, name=f"{name}.turn", perm=perm)

    def _linear(self, name: str, states: str, wide_in: int, wide_out: int) -> str:
        product = self._add("MatMul", states, self._weight(f"{name}.weight", wide_in, wide_out), name=name)
        return self._add("Add", product, self._weight(f"{name}.bias", wide_out), name=f"{name}.add")

    def _norm(self, name: str, states: str) -> str:
        weight = self._weight(f"{name}.weight", self._size.hidden)
        bias = self._weight(f"{name}.bias", self._size.hidden)
        return self._add("LayerNormalization", states, weight, bias, name=name, axis=-1)

    def _weight(self, name: str, *shape: int) -> str:
        self.weights[name] = shape
        return name

    def _add(self, op: str, *inputs: str, name: str, output: str | None = None, **attributes) -> str:
        output = output or f"{name}.output"
        self.nodes.append(helper.make_node(op, inputs, [output], name, **attributes))
        return output


def random_tokens(size: DecoderSize, samples: int, seed: int = 0) -> np.ndarray:
    """(samples, sequence) int64, inputs for calibration."""
    return np.random.default_rng(seed).integers(0, size.vocabulary, (samples, size.sequence), np.int64)
