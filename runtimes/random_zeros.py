"""Random zeros in the weights of a model: the same ones on every machine, for the same seed.

Numpy only, and readable by Python 3.8: the DeepSparse worker loads this file under its own interpreter, so that
a model crosses to the engine once, and not once for every sparsity that it is profiled at.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def impose_zeros(graph: Any, zeros: Mapping[str, float], seed: int) -> None:
    """Set a random fraction of initializers to zero, in place.

    Each element is drawn by itself, so a fraction is met on average. Which elements it hits depends on the
    seed, the initializer's name and its size, and on nothing else.

    Args:
        graph: an onnx.GraphProto whose named initializers keep floats in `raw_data`.
        zeros: initializer name -> fraction in [0, 1].
        seed: 0 or more.
    """
    for tensor in graph.initializer:
        if tensor.name in zeros:
            count = int(np.prod(tensor.dims))
            # As integers: all bits 0 is the number 0 in every float type, whatever numpy knows of it.
            bits = np.frombuffer(tensor.raw_data, f"<u{len(tensor.raw_data) // count}")
            keep = random_words(seed, tensor.name, count) >= int(zeros[tensor.name] * 2**32)
            tensor.raw_data = (bits * keep).tobytes()


def random_words(seed: int, name: str, count: int) -> np.ndarray:
    """(count,) uniform 32-bit integers.

    Straight from the bit generator, whose stream is the same in every version of numpy; what
    `Generator` makes of it may change (NEP 19).
    """
    generator = np.random.PCG64([seed, zlib.crc32(name.encode())])
    return generator.random_raw((count + 1) // 2).astype("<u8").view("<u4")[:count]


def model_with_zeros(model: bytes, zeros: Mapping[str, float], seed: int) -> bytes:
    """The serialized model with `impose_zeros`."""
    import onnx

    proto = onnx.ModelProto.FromString(model)
    impose_zeros(proto.graph, zeros, seed)
    return proto.SerializeToString()
