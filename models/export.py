"""PyTorch module -> ONNX graph."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from onnx_spdy.models.graph import ModelError, one_line

LARGEST_IR_VERSION = 10  # ONNX Runtime releases of a year ago, and other engines, read no newer files


def export_module(
    module: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | Tensor, *, opset: int = 18
) -> onnx.ModelProto:
    """Export a module, as for inference, with an open batch dimension and the names of its parameters.

    The graph's inputs are named like the arguments of `forward`; a single one called `x` becomes `input`. The
    outputs are `output`, or `output_0`, `output_1`, ... The module's training mode is restored.

    Args:
        module: any module whose `forward` takes tensors.
        example_inputs: its arguments, by position or by name; the first axis of each is the batch.
        opset: ONNX operator set, 18 or later.
    Raises:
        ModelError: PyTorch can't export the module; the message has its reason in one line.
    """
    arguments, keywords = _arguments(example_inputs)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with _quiet(), torch.no_grad():
            model = _export(module, arguments, keywords, opset)
    except Exception as exc:  # the exporter raises dozens of types
        raise ModelError(f"PyTorch can't export {type(module).__name__}: {_reason(exc)}") from exc
    finally:
        for part, training in modes.items():
            part.training = training
    model.ir_version = min(model.ir_version, LARGEST_IR_VERSION)
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    numbered = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    _rename_values(model, dict(zip(inputs, _input_names(module, len(arguments), keywords, inputs), strict=True)))
    _rename_values(model, dict(zip(outputs, numbered, strict=True)))
    _name_batch(model)
    return model


def _export(module: nn.Module, arguments: tuple, keywords: dict[str, Any], opset: int) -> onnx.ModelProto:
    def open_batch(value: Any) -> Any:
        return {0: torch.export.Dim.DYNAMIC} if isinstance(value, Tensor) and value.dim() else None

    shapes: Any = tuple(open_batch(value) for value in arguments)
    if keywords:
        shapes = {
            **dict(zip(inspect.signature(module.forward).parameters, shapes, strict=False)),
            **{name: open_batch(value) for name, value in keywords.items()},
        }
    program = torch.onnx.export(
        module, arguments, kwargs=keywords, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
    )
    if program is None:
        raise ModelError("torch.onnx.export returned nothing")
    return program.model_proto


def _arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return ((example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)), {}


def _input_names(module: nn.Module, positional: int, keywords: Mapping[str, Any], exported: list[str]) -> list[str]:
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
        return exported
    given = {*list(parameters)[:positional], *keywords}
    names = [name for name in parameters if name in given]
    if len(names) != len(exported):  # an argument that is no tensor, or holds several
        return exported
    return ["input"] if names == ["x"] else names


def _rename_values(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Rename values all at once; another value that already has one of the new names gets `_inner` appended."""
    graph = model.graph
    mapping = {old: new for old, new in names.items() if old != new}
    produced = {name for node in graph.node for name in node.output}
    every = produced | {value.name for value in (*graph.input, *graph.initializer)}
    for name in set(mapping.values()) & every - set(mapping):
        mapping[name] = f"{name}_inner"
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        for value in values:
            value.name = mapping.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [mapping.get(name, name) for name in node.input]
        node.output[:] = [mapping.get(name, name) for name in node.output]


def _name_batch(model: onnx.ModelProto) -> None:
    """Call the batch dimension `batch`, where the exporter made up a symbol."""
    graph = model.graph
    firsts = [
        value.type.tensor_type.shape.dim[0].dim_param for value in graph.input if value.type.tensor_type.shape.dim
    ]
    if len(set(firsts)) != 1 or not firsts[0]:
        return
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == firsts[0]:
                dim.dim_param = "batch"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress to stdout, and warns about optional packages and its own deprecations.

    Its loggers write to the stderr that they found at their start and have levels of their own, so they can only be
    silenced all together.
    """
    before = logging.root.manager.disable
    silence = io.StringIO()
    try:
        logging.disable(logging.ERROR)
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(exc: BaseException) -> str:
    """The first line of the innermost error: the exporter wraps it in pages of advice."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    lines = [line for line in str(exc).splitlines() if line.strip()]
    return one_line(f"{type(exc).__name__}: {lines[0] if lines else 'no reason given'}")
