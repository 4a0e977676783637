"""The clock: an ONNX file in, seconds out. One file for each engine, one protocol for all."""

from . import telemetry  # noqa: F401  # keeps it off
from .base import (
    ANY_ZEROS,
    FORMULA,
    EngineCrashed,
    EngineHung,
    Environment,
    LayerTime,
    MeasurementError,
    ModelRefused,
    Runtime,
    RuntimeFailure,
    RuntimeUnavailable,
    Session,
    UnknownPrecision,
    UnknownRuntime,
    dense_kernel,
    reason_in,
)
from .deepsparse.client import LICENCE_NOTE as DEEPSPARSE_LICENCE_NOTE
from .errors import OnnxSpdyError
from .host import allowed_cpus, cpu_model, instruction_set, physical_cores
from .load import is_busy, measure_undisturbed
from .measurement import Measurement, measure_interleaved, median_bounds, median_ratio, ratio_confidence
from .model_file import resolved, zero_randomly
from .nvidia.semi_structured import PATTERN as SEMI_STRUCTURED
from .registry import IN_PYTORCH, RUNTIMES, local_spec, location, open_runtime, runtime_spec
from .worker.ssh import PREFIX
from .workload import Workload, WorkloadError

__all__ = [
    "ANY_ZEROS",
    "DEEPSPARSE_LICENCE_NOTE",
    "FORMULA",
    "IN_PYTORCH",
    "PREFIX",
    "RUNTIMES",
    "SEMI_STRUCTURED",
    "EngineCrashed",
    "EngineHung",
    "Environment",
    "LayerTime",
    "Measurement",
    "MeasurementError",
    "ModelRefused",
    "OnnxSpdyError",
    "Runtime",
    "RuntimeFailure",
    "RuntimeUnavailable",
    "Session",
    "UnknownPrecision",
    "UnknownRuntime",
    "Workload",
    "WorkloadError",
    "allowed_cpus",
    "cpu_model",
    "dense_kernel",
    "instruction_set",
    "is_busy",
    "local_spec",
    "location",
    "measure_interleaved",
    "measure_undisturbed",
    "median_bounds",
    "median_ratio",
    "open_runtime",
    "physical_cores",
    "ratio_confidence",
    "reason_in",
    "resolved",
    "runtime_spec",
    "zero_randomly",
]
