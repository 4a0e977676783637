"""Do two graphs compute the same? Asked of ONNX Runtime, with a user's examples or random inputs."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from math import prod

import numpy as np
import onnx
from onnx import TensorProto

from onnx_spdy.models.batch import BakedBatch, Draw, baked_batch, batch_that_outputs_have
from onnx_spdy.models.graph import ModelError, fixed_batch, graph_inputs, input_axes, input_dtypes, input_shapes
from onnx_spdy.models.ort_process import Found, OrtProcess, RunFailed
from onnx_spdy.runtimes.batch_axes import dimensions, is_open

logger = logging.getLogger(__name__)

# For open dimensions besides the batch: sentences, small images, larger images; the first that runs is taken.
OPEN_SIZES = (32, 64, 224, 8, 1)
# Exporters that trace write the example's batch into the graph, most often 1, and still declare it open.
BATCHES = (2, 1, 4, 8, 16, 32, 64)
LARGEST_INPUT_BYTES = 2**28  # random numbers are made in double precision first
TOLERANCE = 1e-4  # of the largest absolute output
HALF_TOLERANCE = 1e-2


class InputTooLarge(ModelError):
    """Random values for an input would take too much memory."""


class Reference:
    """What a graph computes, to compare others with: the same outputs for the same inputs. A context manager.

    The graph runs in a process of its own (see `OrtProcess`), on the first inputs that it takes: the examples, or
    random ones. Two samples where the batch is open, unless only another number of them is right.

    Args:
        given: inputs that aren't random: weights that the graphs were made to read from outside, by their names.
        examples: a batch of the user's data, by input name.
    Attributes:
        baked: the batch that is written into the graph though it declares it open, or None.
    Raises:
        ModelError: ONNX Runtime can't load the graph, crashes, or runs it neither with the examples nor with random
            inputs.
    """

    def __init__(
        self,
        original: onnx.ModelProto,
        given: Sequence[TensorProto] = (),
        examples: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._original = original
        self._noise: list[float] | None = None
        self._process = OrtProcess()
        try:
            self._load(original, "the model")
            self._given = self._process.place_weights(given)
            names = {tensor.name for tensor in given}
            draw, count, reason = self._first_that_runs(_draws(original, names, examples or {}), bool(examples))
            self.baked = self._baked(draw, count, reason)
            inputs = draw(self.baked.size if self.baked else count)
            self._expected = self._run(original, inputs)
            self._inputs: dict[str, Found] = {**self._given, **self._process.place(inputs)}
        except BaseException:
            self._process.__exit__(None, None, None)
            raise

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.__exit__(None, None, None)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the outputs that others are compared with."""
        return [array.shape for array in self._expected]

    def check(
        self, changed: onnx.ModelProto, name: str = "the prepared model", what: str = "preparing the graph"
    ) -> None:
        """Raise ModelError unless the changed graph gives the same outputs.

        The message calls the graph by its `name`, and says `what` changed it.

        Floating outputs may differ by 1e-4 of the largest absolute value (1e-2 in half precision), or by ten times
        what the original differs from itself when ONNX Runtime optimises it, if that is more. Of the elements of
        integer outputs (the index of the largest value, say) 1 % may differ.
        """
        self._load(changed, name)
        actual = self._process.run(self._inputs)
        for i, (value, a, b) in enumerate(zip(self._original.graph.output, self._expected, actual, strict=True)):
            difference, tolerance = _difference(a, b), _tolerance(a)
            if difference > tolerance and difference > 10 * self._noise_of(i):
                raise ModelError(
                    f"{what} changed output '{value.name}' by {difference:.1e} of its largest value "
                    f"(allowed: {tolerance:.0e}); please report this network"
                )

    def _noise_of(self, output: int) -> float:
        """How much an output of the original differs when ONNX Runtime optimises it; 0 where it can't."""
        if self._noise is None:
            self._noise = [0.0] * len(self._expected)
            with contextlib.suppress(ModelError):
                self._load(self._original, "the model", optimise=True)
                again = self._process.run(self._inputs)
                self._noise = [_difference(x, y) for x, y in zip(self._expected, again, strict=True)]
        return self._noise[output]

    def _load(self, model: onnx.ModelProto, what: str, *, optimise: bool = False) -> None:
        self._loaded = model
        try:
            self._process.load(model, what, optimise=optimise)
        except ModelError as exc:
            if not _has_half_precision(model):
                raise
            raise ModelError(f"{exc}; export the network in float32") from exc

    def _first_that_runs(self, draws: Sequence[Draw], has_examples: bool) -> tuple[Draw, int, str]:
        """Of these inputs, the first that run, the number of samples in them, and why a first try failed."""
        model = self._original
        fixed = fixed_batch(model)
        reasons: list[str] = []
        for count, draw in itertools.product(BATCHES if fixed is None else (fixed,), draws):
            try:
                self._run(model, draw(count))
                return draw, count, reasons[0] if reasons else ""
            except RunFailed as exc:
                reasons.append(str(exc))
            except InputTooLarge:
                if not reasons:
                    raise
        if has_examples:
            raise ModelError(f"{reasons[0]}; that is with the example inputs, and random ones don't suit it either")
        if _may_need_special_inputs(model):
            raise ModelError(
                f"{reasons[0]}; random inputs don't suit this network: give example inputs that do (--data)"
            )
        raise ModelError(f"{reasons[0]}; if random inputs are the reason, give example inputs (--data)")

    def _baked(self, draw: Draw, count: int, reason: str) -> BakedBatch | None:
        """The batch that is written into the graph, which runs for `count` samples and not for others before it."""
        model = self._original
        if fixed_batch(model) is not None or not any(axis is not None for axis in input_axes(model).values()):
            return None
        if count == 2:
            return baked_batch(model, draw, self._run)
        if count == 1:
            size = batch_that_outputs_have(model, self._run(model, draw(1))) or 1
            with contextlib.suppress(RunFailed):
                if batch_that_outputs_have(model, self._run(model, draw(size))) == size:
                    count = size
        return BakedBatch(count, f"two samples don't run ({reason})")

    def _run(self, model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if model is not self._loaded:
            self._load(model, "the model")
        placed = self._process.place(inputs)
        try:
            return self._process.run({**self._given, **placed})
        except RunFailed as exc:
            logger.debug("%s with inputs of %s", exc, {name: array.shape for name, array in inputs.items()})
            raise
        finally:
            for path in placed.values():
                path.unlink()


def check_same_results(original: onnx.ModelProto, changed: onnx.ModelProto) -> None:
    """Raise ModelError unless both graphs give the same outputs for the same random inputs; see `Reference`."""
    with Reference(original) as reference:
        reference.check(changed)


def _has_half_precision(model: onnx.ModelProto) -> bool:
    """Few operators take bfloat16 in ONNX Runtime, and exporters mix it and float16 up with float32."""
    return any(tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for tensor in model.graph.initializer)


def _as_declared(
    model: onnx.ModelProto, examples: Mapping[str, np.ndarray], given: Collection[str]
) -> dict[str, np.ndarray]:
    """The examples, each in the element type of its input."""
    dtypes = input_dtypes(model)
    inputs = [name for name in dtypes if name not in given]
    if wrong := set(examples) ^ set(inputs):
        raise ModelError(f"example inputs: '{min(wrong)}' is missing, or no input of the model: {inputs}")
    return {name: np.asarray(array).astype(_storable(dtypes[name])) for name, array in examples.items()}


def _storable(dtype: np.dtype) -> np.dtype:
    return np.dtype(str) if dtype.kind == "O" else dtype


def _may_need_special_inputs(model: onnx.ModelProto) -> bool:
    integers = any(dtype.kind in "iub" for dtype in input_dtypes(model).values())
    return integers or any(None in shape[1:] for shape in input_shapes(model).values())


def _draws(model: onnx.ModelProto, given: Collection[str], examples: Mapping[str, np.ndarray]) -> list[Draw]:
    """Ways to make inputs of so many samples: of the examples, repeated where they are fewer; random ones."""
    axes = input_axes(model)

    def of_examples(count: int) -> dict[str, np.ndarray]:
        return {
            name: array if (axis := axes[name]) is None else array.take(np.arange(count), axis, mode="wrap")
            for name, array in _as_declared(model, examples, given).items()
        }

    drawn: list[Draw] = [partial(_random_inputs, model, size=size, given=given) for size in OPEN_SIZES]
    return [of_examples, *drawn] if examples else drawn


def _random_inputs(model: onnx.ModelProto, batch: int, size: int, given: Collection[str]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dtypes, batch_axes = input_dtypes(model), input_axes(model)
    dims = {value.name: dimensions(value) for value in graph_inputs(model) if value.name not in given}
    batches = {axes[axis].dim_param for name, axes in dims.items() if (axis := batch_axes[name]) is not None} - {""}
    inputs = {}
    for name, axes in dims.items():
        shape = [
            batch if i == batch_axes[name] or axis.dim_param in batches else size if is_open(axis) else axis.dim_value
            for i, axis in enumerate(axes)
        ]
        size_bytes = prod(shape) * dtypes[name].itemsize
        if size_bytes > LARGEST_INPUT_BYTES:
            raise InputTooLarge(
                f"input '{name}' of shape {shape} takes {size_bytes / 2**30:.1f} GiB, more than "
                f"{LARGEST_INPUT_BYTES / 2**30:g}: export the model with smaller inputs"
            )
        if np.issubdtype(dtypes[name], np.integer) or dtypes[name] in (np.bool_, object):
            # 0 and 1 are valid as tokens, types, masks and flags alike, and as texts.
            inputs[name] = rng.integers(0, 2, shape).astype(_storable(dtypes[name]))
        else:
            inputs[name] = rng.standard_normal(shape).astype(dtypes[name])
    return inputs


def _tolerance(values: np.ndarray) -> float:
    if values.dtype in (np.float32, np.float64):
        return TOLERANCE
    return HALF_TOLERANCE  # also the part of integers that may differ


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference / largest absolute value of `a`; for integers the part that differs; inf for other shapes."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or (a.dtype != b.dtype and a.dtype.kind + b.dtype.kind != "UU"):
        return float("inf")
    if a.size == 0:
        return 0.0
    if a.dtype.kind in "iubU":
        return float(np.mean(a != b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    scale = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    largest = np.abs(a - b)[~same].max()
    return float(largest / max(scale, 1e-6)) if np.isfinite(largest) else float("inf")
