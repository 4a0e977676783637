"""What users' functions return by mistake, one function a kind: `--data`, `--metric`, `--loss`, `--pruner` or MODEL.

They are for the network of `setting.py`. Some are odd, but no mistakes.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import torch
from torch import nn

_rng = np.random.default_rng(0)
X = _rng.standard_normal((64, 3, 8, 8)).astype(np.float32)
Y = _rng.integers(0, 10, 64)
not_a_function = 5


def _with(index, value):
    array = X.copy()
    array.flat[index] = value
    return array


class _Raises:
    def __iter__(self):
        raise RuntimeError("no iteration")


class _RaisesInArray:
    shape, dtype = (64, 3, 8, 8), np.dtype("f4")

    def __array__(self, dtype=None, copy=None):
        raise ValueError("no\narray")


def _generator(*batches):
    yield from batches


def _raising(exc, *batches):
    yield from batches
    raise exc


_batch = {"input": X[:8], "target": Y[:8]}

# A value, or a function of no arguments.
DATA = {
    "nan": lambda: {"input": _with(7, np.nan)},
    "infinite": lambda: {"input": _with(7, -np.inf)},
    "float64": lambda: {"input": X.astype(float)},
    "overflows": lambda: {"input": _with(7, 0).astype(float) * 1e300},
    "half": lambda: {"input": X.astype(np.float16)},
    "bytes": lambda: {"input": (X * 20).astype(np.uint8)},
    "integers": lambda: {"input": (X * 20).astype(int)},
    "truths": lambda: {"input": X > 0},
    "objects": lambda: {"input": X.astype(object)},
    "objects_inside": lambda: {"input": np.array([None] * 64)},
    "text": lambda: {"input": X.astype(str)},
    "complex": lambda: {"input": X.astype(complex)},
    "times": lambda: {"input": (X * 20).astype("datetime64[s]")},
    "records": lambda: {"input": np.zeros(64, [("a", "f4"), ("b", "i8")])},
    "big_endian": lambda: {"input": X.astype(">f4"), "target": Y.astype(">i8")},
    "one": lambda: {"input": X[:1], "target": Y[:1]},
    "two": lambda: {"input": X[:2], "target": Y[:2]},
    "none_at_all": lambda: {"input": X[:0], "target": Y[:0]},
    "only_target": lambda: {"target": Y},
    "more": lambda: {"input": X, "other": X},
    "empty": lambda: {},
    "target_short": lambda: {"input": X, "target": Y[:-1]},
    "target_number": lambda: {"input": X, "target": 3},
    "target_one_hot": lambda: {"input": X, "target": np.eye(10)[Y]},
    "target_floats": lambda: {"input": X, "target": Y + 0.5},
    "target_nan": lambda: {"input": X, "target": np.where(Y > 5, np.nan, Y)},
    "target_text": lambda: {"input": X, "target": Y.astype(str)},
    "target_objects": lambda: {"input": X, "target": Y.astype(object)},
    "target_none": lambda: {"input": X, "target": None},
    "target_beyond": lambda: {"input": X, "target": Y + 100},
    "target_negative": lambda: {"input": X, "target": Y - 100},
    "target_huge": lambda: {"input": X, "target": Y.astype(np.uint64) + 2**63},
    "target_records": lambda: {"input": X, "target": np.zeros(64, [("a", "i8")])},
    "target_times": lambda: {"input": X, "target": Y.astype("datetime64[D]")},
    "target_bool": lambda: {"input": X, "target": Y > 5},
    "target_complex": lambda: {"input": X, "target": Y + 1j},
    "target_bytes": lambda: {"input": X, "target": Y.astype("S3")},
    "target_dict": lambda: {"input": X, "target": {"label": Y}},
    "lists": lambda: {"input": X.tolist(), "target": Y.tolist()},
    "ragged": lambda: {"input": [X[0].tolist(), X[1][:, :3].tolist()]},
    "transposed": lambda: {"input": X.transpose(0, 1, 3, 2), "target": Y[::-1]},
    "broadcast": lambda: {"input": np.broadcast_to(X[:1], X.shape)},
    "masked": lambda: {"input": np.ma.masked_greater(X, 1)},
    "matrix": lambda: {"input": np.asmatrix(X[:, 0, 0])},
    "one_axis_less": lambda: {"input": X[0]},
    "one_axis_more": lambda: {"input": X[None]},
    "another_size": lambda: {"input": X[:, :, :4]},
    "no_channels": lambda: {"input": X[:, :0]},
    "number": lambda: {"input": 1.0},
    "none_inside": lambda: {"input": None},
    "dict_inside": lambda: {"input": {"a": X}},
    "set_inside": lambda: {"input": {1, 2}},
    "raises_in_array": lambda: {"input": _RaisesInArray()},
    "zeros": lambda: {"input": 0 * X},
    "all_the_same": lambda: {"input": np.repeat(X[:1], 64, 0)},
    "tiny": lambda: {"input": X * np.float32(1e-42)},
    "huge": lambda: {"input": X * np.float32(3e37)},
    "one_huge": lambda: {"input": _with(5, 1e30)},
    "tensor_sparse": lambda: {"input": torch.from_numpy(X).to_sparse()},
    "tensor_with_gradient": lambda: {"input": torch.from_numpy(X.copy()).requires_grad_()},
    "tensor_bfloat16": lambda: {"input": torch.from_numpy(X).bfloat16()},
    "tensor_meta": lambda: {"input": torch.zeros(64, 3, 8, 8, device="meta")},
    "tensor_complex": lambda: {"input": torch.from_numpy(X).to(torch.complex64)},
    "tensor_quantized": lambda: {"input": torch.quantize_per_tensor(torch.from_numpy(X), 0.1, 0, torch.qint8)},
    "tensor_nested": lambda: {"input": _nested()},
    "keys_are_numbers": lambda: {0: X},
    "keys_are_mixed": lambda: {"input": X, 0: X},
    "key_is_none": lambda: {None: X},
    "key_is_a_tuple": lambda: {("x",): X},
    "nothing": lambda: None,
    "an_integer": lambda: 5,
    "a_path": lambda: "data.npz",
    "the_class": lambda: dict,
    "a_tuple": lambda: (X, Y),
    "a_long_tuple": lambda: (X, Y, Y),
    "an_empty_tuple": lambda: (),
    "an_empty_list": lambda: [],
    "an_array": lambda: X,
    "a_function": lambda: lambda: {"input": X},
    "raises_in_iter": lambda: _Raises(),
    "batches": lambda: [_batch, {"input": X[8:9], "target": Y[8:9]}],
    "batches_of_none": lambda: _generator(None),
    "batches_of_numbers": lambda: _generator(5),
    "batches_of_text": lambda: _generator("x"),
    "batches_end_in_an_error": lambda: _raising(OSError("disk gone"), _batch),
    "batches_end_in_an_exit": lambda: _raising(SystemExit(3), _batch),
    "batches_end_in_a_stop": lambda: _raising(StopIteration(), _batch),
    "batches_end_in_memory": lambda: _raising(MemoryError(), _batch),
    "batches_of_two_sizes": lambda: _generator(_batch, {"input": X[:8, :, :4], "target": Y[:8]}),
    "batches_of_two_ranks": lambda: _generator(_batch, {"input": X[8], "target": Y[:1]}),
    "batches_of_two_kinds": lambda: _generator(_batch, (X, Y), X),
    "batches_of_two_keys": lambda: _generator(_batch, {"input": X}),
    "batches_without_axes": lambda: _generator(*({"input": X[i : i + 1], "target": Y[i]} for i in range(8))),
    "batches_with_text": lambda: _generator(_batch, {"input": X.astype(str), "target": Y}),
    "batches_with_text_targets": lambda: _generator(_batch, {"input": X, "target": Y.astype(str)}),
    "batches_empty": lambda: _generator({"input": X[:0], "target": Y[:0]}, _batch),
    "raises": lambda: _throw(RuntimeError("my data\nfunction fails")),
    "raises_nothing_said": lambda: _throw(KeyError()),
    "raises_a_group": lambda: _throw(ValueError("\N{SNOWMAN}\x1b[31m" * 2000)),
    "raises_memory": lambda: _throw(MemoryError()),
    "raises_recursion": lambda: _deeper(),
    "raises_stop": lambda: _throw(StopIteration()),
    "exits": lambda: sys.exit(3),
    "exits_with_words": lambda: sys.exit("no data today"),
    "is_interrupted": lambda: _throw(KeyboardInterrupt()),
    "wants_arguments": lambda one: {"input": X},
}


def _nested():
    with warnings.catch_warnings():  # PyTorch's own, that they are a prototype
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(3, 8, 8), torch.zeros(3, 4, 8)])


def _throw(exc):
    raise exc


def _deeper():
    return _deeper()


def _accuracy(outputs, target):
    return float((outputs["y"].argmax(1) == target).mean())


def _in_place(outputs, target):
    value = _accuracy(outputs, target)
    outputs["y"][:] = 0
    target[:] = 0
    return value


METRICS = {
    "right": _accuracy,
    "nan": lambda outputs, target: float("nan"),
    "infinite": lambda outputs, target: float("-inf"),
    "text": lambda outputs, target: "good",
    "number_as_text": lambda outputs, target: "0.5",
    "none": lambda outputs, target: None,
    "array_of_one": lambda outputs, target: np.array([0.5]),
    "array_of_two": lambda outputs, target: np.array([0.5, 0.6]),
    "empty_array": lambda outputs, target: np.array([]),
    "tuple": lambda outputs, target: (0.5, 0.6),
    "dict": lambda outputs, target: {"top1": 0.5},
    "complex": lambda outputs, target: 1j,
    "truth": lambda outputs, target: True,
    "large_integer": lambda outputs, target: 10**400,
    "tensor": lambda outputs, target: torch.tensor(0.5),
    "tensor_with_gradient": lambda outputs, target: torch.tensor(0.5, requires_grad=True),
    "function": lambda outputs, target: _accuracy,
    "raises": lambda outputs, target: outputs["z"],
    "raises_memory": lambda outputs, target: _throw(MemoryError("all of it")),
    "raises_recursion": lambda outputs, target: _deeper(),
    "raises_attribute": lambda outputs, target: target.numpy(),
    "exits": lambda outputs, target: sys.exit(0),
    "in_place": _in_place,
    "wants_one": lambda outputs: 0.5,
    "wants_three": lambda outputs, target, more: 0.5,
}


def _square(outputs, dense, target):
    return (outputs["y"] - dense["y"]).square().mean()


def _loss_in_place(outputs, dense, target):
    value = _square(outputs, dense, target)
    outputs["y"].zero_()
    dense["y"].zero_()
    return value


_calls = [0]


def _raises_later(outputs, dense, target):
    _calls[0] += 1
    return _square(outputs, dense, target) if _calls[0] < 6 else _throw(IndexError("later"))


LOSSES = {
    "right": _square,
    "nan": lambda outputs, dense, target: torch.tensor(float("nan")),
    "nan_when_pruned": lambda outputs, dense, target: _square(outputs, dense, target) / 0,
    "infinite": lambda outputs, dense, target: torch.tensor(float("inf")),
    "text": lambda outputs, dense, target: "abc",
    "none": lambda outputs, dense, target: None,
    "number": lambda outputs, dense, target: 0.5,
    "numpy": lambda outputs, dense, target: np.float32(_square(outputs, dense, target).item()),
    "vector": lambda outputs, dense, target: (outputs["y"] - dense["y"]).square().mean(1),
    "empty": lambda outputs, dense, target: torch.zeros(0),
    "negative": lambda outputs, dense, target: -_square(outputs, dense, target),
    "zero": lambda outputs, dense, target: torch.tensor(0.0),
    "integer": lambda outputs, dense, target: torch.tensor(3),
    "truth": lambda outputs, dense, target: torch.tensor(True),
    "complex": lambda outputs, dense, target: torch.tensor(1j),
    "tuple": lambda outputs, dense, target: (_square(outputs, dense, target), 1),
    "dict": lambda outputs, dense, target: {"loss": _square(outputs, dense, target)},
    "large_integer": lambda outputs, dense, target: 10**400,
    "meta": lambda outputs, dense, target: torch.zeros((), device="meta"),
    "random": lambda outputs, dense, target: torch.rand(()),
    "large": lambda outputs, dense, target: _square(outputs, dense, target).double() * 1e300,
    "small": lambda outputs, dense, target: _square(outputs, dense, target) * 1e-40,
    "raises": lambda outputs, dense, target: _throw(ValueError("boo")),
    "raises_later": _raises_later,
    "raises_memory": lambda outputs, dense, target: _throw(MemoryError()),
    "raises_of_torch": lambda outputs, dense, target: outputs["y"] @ torch.zeros(3, 3),
    "exits": lambda outputs, dense, target: sys.exit("enough"),
    "in_place": _loss_in_place,
    "with_text_target": lambda outputs, dense, target: _square(outputs, dense, target) + target.float().mean(),
    "wants_one": lambda outputs: torch.tensor(0.0),
}


def _magnitude(weight, hessian, level):
    flat = weight.clone().flatten()
    flat[flat.abs().argsort()[: level.zeros(flat.numel())]] = 0
    return flat.view_as(weight)


def _pruner_in_place(weight, hessian, level):
    weight.copy_(_magnitude(weight, hessian, level))
    hessian.zero_()
    return weight


PRUNERS = {
    "right": _magnitude,
    "none": lambda weight, hessian, level: None,
    "number": lambda weight, hessian, level: 5,
    "text": lambda weight, hessian, level: "w",
    "list": lambda weight, hessian, level: _magnitude(weight, hessian, level).tolist(),
    "tuple": lambda weight, hessian, level: (_magnitude(weight, hessian, level),),
    "unchanged": lambda weight, hessian, level: weight,
    "nan": lambda weight, hessian, level: _magnitude(weight, hessian, level) * float("nan"),
    "flat": lambda weight, hessian, level: _magnitude(weight, hessian, level).flatten(),
    "numpy": lambda weight, hessian, level: _magnitude(weight, hessian, level).numpy(),
    "float64": lambda weight, hessian, level: _magnitude(weight, hessian, level).double(),
    "half": lambda weight, hessian, level: _magnitude(weight, hessian, level).half(),
    "integers": lambda weight, hessian, level: _magnitude(weight, hessian, level).int(),
    "truths": lambda weight, hessian, level: _magnitude(weight, hessian, level) != 0,
    "complex": lambda weight, hessian, level: _magnitude(weight, hessian, level).to(torch.complex64),
    "sparse": lambda weight, hessian, level: _magnitude(weight, hessian, level).to_sparse(),
    "meta": lambda weight, hessian, level: _magnitude(weight, hessian, level).to("meta"),
    "with_gradient": lambda weight, hessian, level: _magnitude(weight, hessian, level).requires_grad_(),
    "parameter": lambda weight, hessian, level: nn.Parameter(_magnitude(weight, hessian, level)),
    "not_contiguous": lambda weight, hessian, level: _magnitude(weight, hessian, level).mT.contiguous().mT,
    "in_place": _pruner_in_place,
    "empty": lambda weight, hessian, level: torch.zeros(0),
    "raises": lambda weight, hessian, level: _throw(RuntimeError("p")),
    "raises_of_torch": lambda weight, hessian, level: torch.linalg.cholesky(-hessian),
    "raises_memory": lambda weight, hessian, level: _throw(MemoryError()),
    "exits": lambda weight, hessian, level: sys.exit(1),
    "wants_one": lambda weight: weight,
}


def _module():
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10)).eval()


class _Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 32)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class _Raising(nn.Module):
    def forward(self, x):
        raise RuntimeError("in\nforward")


class _Output(nn.Module):
    """Returns what it is given, a dict, a number, nothing."""

    def __init__(self, output):
        super().__init__()
        self.layer, self.output = nn.Conv2d(3, 32, 3), output

    def forward(self, x):
        return self.output(self.layer(x))


_X = torch.zeros(2, 3, 8, 8)
MODELS = {
    "right": lambda: (_module(), (_X,)),
    "module_alone": lambda: _module(),
    "a_list": lambda: [_module(), (_X,)],
    "a_dict": lambda: {"model": _module()},
    "no_inputs": lambda: (_module(), ()),
    "inputs_none": lambda: (_module(), None),
    "inputs_array": lambda: (_module(), (_X.numpy(),)),
    "inputs_tensor": lambda: (_module(), _X),
    "inputs_dict": lambda: (_module(), {"input": _X}),
    "inputs_text": lambda: (_module(), "x"),
    "too_many_inputs": lambda: (_module(), (_X, _X)),
    "another_size": lambda: (_module(), (_X[:, :2],)),
    "no_batch": lambda: (_module(), (_X[0],)),
    "empty_batch": lambda: (_module(), (_X[:0],)),
    "odd_axes": lambda: (_module(), (_X,), 5),
    "axes_of_others": lambda: (_module(), (_X,), {"nothing": {0: "batch"}}),
    "four_values": lambda: (_module(), (_X,), {}, {}),
    "state": lambda: (_module().state_dict(), (_X,)),
    "class": lambda: (nn.Linear, (_X,)),
    "function": lambda: (lambda x: x, (_X,)),
    "none": lambda: None,
    "text": lambda: "net.onnx",
    "training": lambda: (_module().train(), (_X,)),
    "half": lambda: (_module().half(), (_X,)),
    "double": lambda: (_module().double(), (_X.double(),)),
    "meta": lambda: (_module().to("meta"), (_X,)),
    "branches": lambda: (_Branches(), (_X,)),
    "raising": lambda: (_Raising(), (_X,)),
    "no_weights": lambda: (nn.ReLU(), (_X,)),
    "identity": lambda: (nn.Identity(), (_X,)),
    "returns_a_dict": lambda: (_Output(lambda x: {"a": x, "b": x + 1}), (_X,)),
    "returns_a_list": lambda: (_Output(lambda x: [x, (x, x)]), (_X,)),
    "returns_a_number": lambda: (_Output(lambda x: 3), (_X,)),
    "returns_none": lambda: (_Output(lambda x: None), (_X,)),
    "returns_item": lambda: (_Output(lambda x: x.sum().item()), (_X,)),
    "nan_weights": lambda: (_with_weights(float("nan")), (_X,)),
    "infinite_weights": lambda: (_with_weights(float("inf")), (_X,)),
    "raises": lambda: _throw(FileNotFoundError("weights.pt")),
    "raises_memory": lambda: _throw(MemoryError()),
    "raises_recursion": lambda: _deeper(),
    "exits": lambda: sys.exit("bye"),
    "wants_arguments": lambda one: (_module(), (_X,)),
}


def _with_weights(value):
    module = _module()
    module[0].weight.data.view(-1)[3] = value
    return module


KINDS = {"data": DATA, "metric": METRICS, "loss": LOSSES, "pruner": PRUNERS, "model": MODELS}
for _kind, _functions in KINDS.items():
    globals().update({f"{_kind}_{_name}": _function for _name, _function in _functions.items()})
