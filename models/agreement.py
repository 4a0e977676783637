"""Do two graphs compute the same? Asked of ONNX Runtime, with random inputs."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Collection, Mapping
from math import prod

import numpy as np
import onnx
from onnx import TensorProto

from onnx_spdy.models.graph import ModelError, graph_inputs, input_dtypes, input_shapes, one_line

logger = logging.getLogger(__name__)

# For open dimensions besides the batch: sentences, small images, larger images; the first that runs is taken.
OPEN_SIZES = (32, 64, 224, 8, 1)
# Exporters that trace write the example's batch into the graph, most often 1, and still declare it open.
BATCHES = (2, 1)
LONGEST_RUN_SECONDS = 60
LARGEST_INPUT_BYTES = 2**28  # random numbers are made in double precision first
TOLERANCE = 1e-4  # of the largest absolute output
HALF_TOLERANCE = 1e-2


def check_same_results(
    original: onnx.ModelProto, changed: onnx.ModelProto, given: Mapping[str, np.ndarray] | None = None
) -> None:
    """Raise ModelError unless both graphs give the same outputs for the same random inputs.

    `given` are inputs that aren't random: weights that both graphs were made to read from outside.

    Floating outputs may differ by 1e-4 of the largest absolute value (1e-2 in half precision), or by ten times what
    the original differs from itself when ONNX Runtime optimises it, if that is more. Of the elements of integer
    outputs (the index of the largest value, say) 1 % may differ.

    When no random input suits a graph with integer inputs or open dimensions besides the batch (it needs ids of a
    certain form, images of a certain size, ...) nothing can be compared, and that is logged as a warning.

    Raises:
        ModelError: the outputs differ, or ONNX Runtime can't load or run one of the graphs.
    """
    reference = _session(original, "the model")
    candidate = _session(changed, "the prepared model")
    found = _inputs_that_run(original, reference, given or {})
    if found is None:
        logger.warning("the prepared model could not be compared with the original: it runs with no random inputs")
        return
    inputs, expected = found
    try:
        actual = _run(candidate, inputs)
    except ModelError:
        raise
    except Exception as exc:
        raise ModelError(f"preparing the graph broke it: ONNX Runtime can't run it: {one_line(str(exc))}") from exc
    noise: list[float] | None = None
    for i, (value, a, b) in enumerate(zip(original.graph.output, expected, actual, strict=True)):
        difference, tolerance = _difference(a, b), _tolerance(a)
        if difference > tolerance:
            if noise is None:
                again = _session(original, "the model", optimise=True).run(None, inputs)
                noise = [_difference(x, y) for x, y in zip(expected, again, strict=True)]
            if difference > 10 * noise[i]:
                raise ModelError(
                    f"preparing the graph changed output '{value.name}' by {difference:.1e} of its largest value "
                    f"(allowed: {tolerance:.0e}); please report this network"
                )


def _session(model: onnx.ModelProto, what: str, optimise: bool = False):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # it would keep what a large run took, and more
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime's errors have no common base
        advice = "; export the network in float32" if _has_half_precision(model) else ""
        raise ModelError(f"ONNX Runtime can't load {what}: {one_line(str(exc))}{advice}") from exc


def _has_half_precision(model: onnx.ModelProto) -> bool:
    """Few operators take bfloat16 in ONNX Runtime, and exporters mix it and float16 up with float32."""
    return any(tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for tensor in model.graph.initializer)


def _run(session, inputs: Mapping[str, np.ndarray]) -> list:
    """The session's outputs; ModelError after LONGEST_RUN_SECONDS, because a loop may have no end."""
    import onnxruntime as ort

    options, ended = ort.RunOptions(), threading.Event()

    def stop() -> None:
        options.terminate = True
        ended.set()

    timer = threading.Timer(LONGEST_RUN_SECONDS, stop)
    timer.start()
    try:
        return session.run(None, inputs, options)
    except Exception as exc:
        if ended.is_set():
            raise ModelError(f"one run of the model takes more than {LONGEST_RUN_SECONDS} s in ONNX Runtime") from exc
        raise
    finally:
        timer.cancel()


def _inputs_that_run(
    model: onnx.ModelProto, session, given: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list] | None:
    """Random inputs and the outputs for them; None if none suits a graph that may well need special ones."""
    reason = ""
    for batch, size in itertools.product(BATCHES, OPEN_SIZES):
        inputs = {**_random_inputs(model, batch, size, given), **given}
        try:
            return inputs, _run(session, inputs)
        except ModelError:
            raise
        except Exception as exc:  # ONNX Runtime's errors have no common base
            reason = reason or one_line(str(exc))
            logger.debug("random inputs (batch %d, open dimensions of %d) don't run: %s", batch, size, exc)
    if not _may_need_special_inputs(model):
        raise ModelError(f"ONNX Runtime can't run the model: {reason}")
    return None


def _may_need_special_inputs(model: onnx.ModelProto) -> bool:
    integers = any(dtype.kind in "iub" for dtype in input_dtypes(model).values())
    return integers or any(None in shape[1:] for shape in input_shapes(model).values())


def _random_inputs(model: onnx.ModelProto, batch: int, size: int, given: Collection[str]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dtypes = input_dtypes(model)
    free = [value for value in graph_inputs(model) if value.name not in given]
    dims = {value.name: list(value.type.tensor_type.shape.dim) for value in free}
    batches = {axes[0].dim_param for axes in dims.values() if axes} - {""}
    inputs = {}
    for name, axes in dims.items():
        shape = [
            axis.dim_value if axis.dim_value > 0 else batch if i == 0 or axis.dim_param in batches else size
            for i, axis in enumerate(axes)
        ]
        size_bytes = prod(shape) * dtypes[name].itemsize
        if size_bytes > LARGEST_INPUT_BYTES:
            raise ModelError(
                f"input '{name}' of shape {shape} takes {size_bytes / 2**30:.1f} GiB, more than "
                f"{LARGEST_INPUT_BYTES / 2**30:g}: export the model with smaller inputs"
            )
        if np.issubdtype(dtypes[name], np.integer) or dtypes[name] == np.bool_:
            # 0 and 1 are valid as tokens, types, masks and flags alike.
            inputs[name] = rng.integers(0, 2, shape).astype(dtypes[name])
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
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.size == 0:
        return 0.0
    if a.dtype.kind in "iub" or a.dtype == object:
        return float(np.mean(a != b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    scale = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    largest = np.abs(a - b)[~same].max()
    return float(largest / max(scale, 1e-6)) if np.isfinite(largest) else float("inf")
