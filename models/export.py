"""PyTorch module -> ONNX graph."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from onnx_spdy.models.graph import FLOATS, ModelError, one_line
from onnx_spdy.models.surgery import edit
from onnx_spdy.models.wrapped import plain_inputs, plain_module

LARGEST_IR_VERSION = 10  # ONNX Runtime releases of a year ago, and other engines, read no newer files


def export_module(
    module: nn.Module,
    example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
    open_axes: Mapping[str, Mapping[int, str]] | None = None,
    *,
    opset: int = 18,
) -> onnx.ModelProto:
    """Export a module, as for inference, with an open batch dimension and the names of its parameters.

    The graph's inputs are named like the arguments of `forward`; a single one called `x` becomes `input`. The
    outputs are `output`, or `output_0`, `output_1`, ... The module's training mode is restored.

    Args:
        module: any module whose `forward` takes tensors, also in DataParallel or compiled, or TorchScript.
        example_inputs: its arguments, tensors or arrays, by position or by name; the first axis of each is the batch.
        open_axes: more axes that may have any size, as {argument of `forward`: {axis: name}}, say
            {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}.
        opset: ONNX operator set, 18 or later.
    Raises:
        ModelError: PyTorch can't export the module; the message has its reason in one line.
    """
    module = plain_module(module)
    arguments, keywords = _arguments(plain_inputs(example_inputs))
    modes = {part: part.training for part in module.modules()}
    module.eval()
    axes = _open_axes(module, arguments, keywords, open_axes or {})
    try:
        with _quiet(), torch.no_grad():
            model = _export(module, arguments, keywords, axes, opset)
    except Exception as exc:  # the exporter raises dozens of types
        raise ModelError(f"PyTorch can't export {type(module).__name__}: {_reason(exc)}") from exc
    finally:
        for part, training in modes.items():
            part.training = training
    model.ir_version = min(model.ir_version, LARGEST_IR_VERSION)
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    numbered = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    named = dict(zip(inputs, _input_names(module, len(arguments), keywords, inputs), strict=True))
    _rename_values(model, named | dict(zip(outputs, numbered, strict=True)) | _transposed(model, module))
    _name_axes(model, [axes[name] for name in _in_order(module, len(arguments), keywords)])
    return model


def _export(
    module: nn.Module, arguments: tuple, keywords: dict[str, Any], axes: Mapping[str, Mapping[int, str]], opset: int
) -> onnx.ModelProto:
    def shape_of(name: str) -> Any:
        return dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) or None

    names = _in_order(module, len(arguments), keywords)
    if isinstance(module, torch.jit.ScriptModule):  # PyTorch's newer exporter can't read it
        stream = io.BytesIO()
        torch.onnx.export(
            module,
            arguments,
            stream,  # type: ignore[arg-type]
            kwargs=keywords,
            dynamo=False,
            opset_version=opset,
            input_names=names,
            dynamic_axes={name: axes[name] for name in names if axes[name]},
        )
        return onnx.load_model_from_string(stream.getvalue())
    shapes: Any = tuple(shape_of(name) for name in names[: len(arguments)])
    if keywords:
        shapes = {name: shape_of(name) for name in names}
    program = torch.onnx.export(
        module, arguments, kwargs=keywords, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
    )
    if program is None:
        raise ModelError("torch.onnx.export returned nothing")
    return program.model_proto


def _open_axes(
    module: nn.Module, arguments: tuple, keywords: Mapping[str, Any], more: Mapping[str, Mapping[int, str]]
) -> dict[str, dict[int, str]]:
    """Argument -> its open axes with their names: the first one of each tensor, and what the user asks for."""
    names = _in_order(module, len(arguments), keywords)
    values = {**dict(zip(names, arguments, strict=False)), **keywords}
    if unknown := set(more) - set(values):
        raise ModelError(f"open axes of '{min(unknown)}', but the example inputs are {names}")
    axes: dict[str, dict[int, str]] = {}
    for name, value in values.items():
        rank = value.dim() if isinstance(value, Tensor) else 0
        axes[name] = {**({0: "batch"} if rank else {}), **more.get(name, {})}
        if wrong := [axis for axis in axes[name] if not 0 <= axis < rank]:
            raise ModelError(f"open axis {wrong[0]} of '{name}', which has {rank} axes in the example inputs")
    return axes


def _in_order(module: nn.Module, positional: int, keywords: Mapping[str, Any]) -> list[str]:
    """The names of the given arguments, in the order of `forward`; numbers where it takes any (*args)."""
    kinds = _parameter_kinds(module)
    names = [name for name, kind in kinds.items() if kind is not inspect.Parameter.VAR_POSITIONAL]
    if len(names) < positional:
        names = [str(i) for i in range(positional)]
    given = names[:positional]
    rest = [name for name in (*kinds, *keywords) if name in keywords and name not in given]
    return [*given, *dict.fromkeys(rest)]


def _parameter_kinds(module: nn.Module) -> dict[str, Any]:
    """Name -> kind, of the arguments of `forward`."""
    if isinstance(module, torch.jit.ScriptModule):
        schema = module.forward.schema  # type: ignore[attr-defined]
        return {argument.name: inspect.Parameter.POSITIONAL_OR_KEYWORD for argument in schema.arguments[1:]}
    return {name: one.kind for name, one in inspect.signature(module.forward).parameters.items()}


def _arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Arguments by position and by name. Each tensor is one of its own: the exporter makes one input of two that are
    the same object, and the graph then ignores the other."""
    if isinstance(example_inputs, Mapping):
        return (), {name: _own(value) for name, value in example_inputs.items()}
    return (_own(example_inputs),) if isinstance(example_inputs, Tensor) else tuple(map(_own, example_inputs)), {}


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _input_names(module: nn.Module, positional: int, keywords: Mapping[str, Any], exported: list[str]) -> list[str]:
    if isinstance(module, torch.jit.ScriptModule):  # exported with the names of its arguments
        return ["input"] if exported == ["x"] else exported
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
    with edit(model) as graph:
        tensors = graph.tensors()
        in_the_way = tensors.keys() & set(names.values()) - names.keys()
        for old, new in (*names.items(), *((name, f"{name}_inner") for name in in_the_way)):
            tensors[old].name = new


def _name_axes(model: onnx.ModelProto, axes: Sequence[Mapping[int, str]]) -> None:
    """Call open dimensions by their names where the exporter made up symbols; it has one symbol for equal sizes."""
    graph = model.graph
    if len(graph.input) != len(axes):  # an argument that is no tensor, or holds several
        axes = [{0: "batch"}] * len(graph.input)
    symbols: dict[str, str] = {}
    for value, named in zip(graph.input, axes, strict=True):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and axis in named:
                symbols.setdefault(dim.dim_param, named[axis])
    if list(symbols.values()).count("batch") > 1:  # inputs whose first axes may differ
        symbols = {symbol: name for symbol, name in symbols.items() if name != "batch"}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = symbols[dim.dim_param]


def _transposed(model: onnx.ModelProto, module: nn.Module) -> dict[str, str]:
    """Number -> `NAME.T` for each weight of a linear layer that the exporter stored transposed."""
    parameters = dict(module.named_parameters())
    stored = {tensor.name for tensor in model.graph.initializer}
    alike: dict[tuple[tuple[int, ...], bytes], list[str]] = {}  # shape and first row, transposed -> parameters
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            shape = tuple(parameter.shape)[::-1]
            alike.setdefault((shape, _in_double(parameter[:, :1]).tobytes()), []).append(name)
    names: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.name in parameters or len(tensor.dims) != 2 or tensor.data_type not in FLOATS:
            continue
        values = numpy_helper.to_array(tensor)
        for name in alike.get((values.shape, values[:1].astype("f8").tobytes()), ()):
            free = f"{name}.T" not in stored.union(names.values())
            if free and np.array_equal(_in_double(parameters[name]).T, values.astype("f8")):
                names[tensor.name] = f"{name}.T"
                break
    return names


def _in_double(parameter: Tensor) -> np.ndarray:
    return parameter.detach().cpu().double().numpy()


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
