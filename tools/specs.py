"""What a user types: MODEL, DATA, M and L, resolved to values. `FILE.py:FUNCTION` is the user's own code."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import psutil

from onnx_spdy.models import (
    Prepared,
    check_interface,
    export_module,
    fixed_batch,
    input_axes,
    input_dtypes,
    input_shapes,
    load_model,
    prepare,
)
from onnx_spdy.pipeline.artifact import file_sha256
from onnx_spdy.pipeline.data import Samples, as_samples, read_npz, workload_of
from onnx_spdy.pipeline.database.pruners import NamedPruner, one_level, pruner_named
from onnx_spdy.pipeline.loss import LOSSES, Loss, LossError
from onnx_spdy.pipeline.metric import METRICS, Metric, MetricError
from onnx_spdy.runtimes import Workload, WorkloadError
from onnx_spdy.runtimes.errors import OnnxSpdyError, described

EXAMPLES = 2  # samples on which the prepared network is compared with the original

_numbers = itertools.count()


class SpecError(OnnxSpdyError, ValueError):
    """An argument names nothing that can be used; the message says what was expected."""


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION names. Files beside it can be imported by it.

    Raises:
        SpecError: no such file or function, or the file can't be imported.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not file.endswith(".py") or not name.isidentifier():
        raise SpecError(f"{what} {spec!r} is not FILE.py:FUNCTION")
    if not path.is_file():
        raise SpecError(f"{what} {spec!r}: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location(f"_onnx_spdy_user_{next(_numbers)}", path.resolve())
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickling in the user's file look themselves up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        raise SpecError(f"{what} {spec!r}: importing {file} raised {described(exc)}") from exc
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        raise SpecError(f"{what} {spec!r}: {file} has no function {name!r}")
    return _translating(function, f"{what} {spec!r}", f"{name}@{file_sha256(path)[:12]}")


def _translating(function: Callable[..., Any], what: str, identity: str) -> Callable[..., Any]:
    """The user's function, whose exceptions become one line that names it.

    Its `identity` is its name and a checksum of its file: what was computed with it isn't taken for another's.
    """

    def called(*args: Any) -> Any:
        try:
            return function(*args)
        except (Exception, SystemExit) as exc:
            raise SpecError(f"{what} raised {described(exc)}") from exc

    called.__name__ = getattr(function, "__name__", "custom")
    called.identity = identity  # type: ignore[attr-defined]
    return called


def load_network(spec: str, *, mapped: bool = False) -> Prepared:
    """MODEL, prepared: a path ending in .onnx, or FILE.py:FUNCTION returning (module, example_inputs[, open_axes]).

    It is compared with the original on random inputs; see `load_inputs`. `mapped`: see `load_model`.

    Raises:
        SpecError, ModelError: it is neither, or not a network that can be used.
    """
    return prepare(_load_graph(spec, mapped=mapped))


def load_inputs(model: str, data: str, *, mapped: bool = False) -> tuple[Prepared, Samples]:
    """MODEL, prepared and compared with the original on some samples of DATA, and DATA as samples.

    `mapped`: see `load_model`.

    Raises:
        SpecError, ModelError, DataError: as `load_network` and `load_samples`.
    """
    graph = _load_graph(model, mapped=mapped)
    check_interface(graph, "the model")
    samples = _load_data(data, graph)
    some = samples.take(slice(0, fixed_batch(graph) or EXAMPLES))
    return prepare(graph, some.inputs, samples.axes), samples


def _load_graph(spec: str, *, mapped: bool) -> onnx.ModelProto:
    if spec.endswith(".onnx"):
        return load_model(Path(spec).expanduser(), mapped=mapped)
    if ".py:" not in spec:
        raise SpecError(f"model {spec!r} is neither a path ending in .onnx nor FILE.py:FUNCTION")
    result = load_function(spec, "model")()
    if not (isinstance(result, tuple) and len(result) in (2, 3)):
        raise SpecError(
            f"model {spec!r} must return (module, example_inputs), or open axes as a third, "
            f"it returned {type(result).__name__}"
        )
    return export_module(*result)


def load_samples(spec: str, network: Prepared) -> Samples:
    """DATA, checked against the network: FILE.npz, or FILE.py:FUNCTION returning a dict or batches of dicts.

    Raises:
        SpecError, DataError: it is neither, or doesn't fit the network.
    """
    return _load_data(spec, network.proto)


def _load_data(spec: str, graph: onnx.ModelProto) -> Samples:
    if spec.endswith(".npz"):
        data: Any = read_npz(Path(spec).expanduser())
    elif ".py:" in spec:
        data = load_function(spec, "data")()
        if isinstance(data, str | bytes) or not hasattr(data, "__iter__"):
            raise SpecError(
                f"data {spec!r} must return arrays (a dict, a tuple in the order of the inputs, one array) or batches "
                f"of them, not {type(data).__name__}"
            )
    else:
        raise SpecError(f"data {spec!r} is neither a path ending in .npz nor FILE.py:FUNCTION")
    return as_samples(data, input_shapes(graph), input_dtypes(graph), input_axes(graph))


def load_workload(samples: Samples | None, network: Prepared, batch: int, threads: int | None) -> Workload:
    """What to time a network with: samples, or random values.

    Raises:
        WorkloadError: this machine has no memory for the inputs of one run.
    """
    shapes, dtypes = input_shapes(network.proto), input_dtypes(network.proto)
    if samples is None:
        sizes = [math.prod(size or 1 for size in shapes[name][1:]) * dtypes[name].itemsize for name in shapes]
    else:
        sizes = [array.nbytes // len(samples) for array in samples.inputs.values()]
    need, there = batch * sum(sizes), psutil.virtual_memory().total
    if need > there:
        raise WorkloadError(
            f"batch {batch} takes {need / 2**30:.3g} GiB for the inputs of one run, this machine has "
            f"{there / 2**30:.3g} GiB of memory; take a smaller --batch"
        )
    return workload_of(samples, batch, threads)


def load_metric(spec: str) -> Metric:
    """M: a known name or FILE.py:FUNCTION.

    Raises:
        SpecError, MetricError: it is neither.
    """
    if spec in METRICS:
        return METRICS[spec]
    if ".py:" in spec:
        return load_function(spec, "metric")
    raise MetricError(f"unknown metric {spec!r}; known: {', '.join(METRICS)}, or FILE.py:FUNCTION")


def load_loss(spec: str | None) -> str | Loss | None:
    """L: a known name, FILE.py:FUNCTION, or None for the default.

    Raises:
        SpecError, LossError: it is none of these.
    """
    if spec is None or spec in LOSSES:
        return spec
    if ".py:" in spec:
        return load_function(spec, "loss")
    raise LossError(f"unknown loss {spec!r}; known: {', '.join(LOSSES)}, or FILE.py:FUNCTION")


def load_pruner(spec: str) -> NamedPruner:
    """A pruner: a known name, or FILE.py:FUNCTION, `(weight, hessian, level) -> weight`.

    A function's file is part of its name, by checksum: after a change the database is another one.

    Raises:
        SpecError, UnknownPruner: it is neither.
    """
    if ".py:" not in spec:
        return pruner_named(spec)
    function = load_function(spec, "pruner")
    file = Path(spec.rpartition(":")[0]).expanduser()
    return NamedPruner(f"{spec} {file_sha256(file)[:12]}", one_level(function))
