"""The clock: an ONNX file in, seconds out. One file for each engine, one protocol for all."""

from .base import (
    EngineCrashed,
    EngineHung,
    Environment,
    LayerTime,
    ModelRefused,
    Runtime,
    RuntimeFailure,
    RuntimeUnavailable,
    Session,
    UnknownRuntime,
)
from .deepsparse_client import LICENCE_NOTE as DEEPSPARSE_LICENCE_NOTE
from .host import allowed_cpus, cpu_model, instruction_set, physical_cores
from .load import is_busy
from .measurement import Measurement, measure_interleaved, median_bounds, median_ratio, ratio_confidence
from .model_file import zero_randomly
from .registry import RUNTIMES, location, open_runtime, runtime_spec
from .vino import UnknownPrecision

__all__ = [
    "DEEPSPARSE_LICENCE_NOTE",
    "RUNTIMES",
    "EngineCrashed",
    "EngineHung",
    "Environment",
    "LayerTime",
    "Measurement",
    "ModelRefused",
    "Runtime",
    "RuntimeFailure",
    "RuntimeUnavailable",
    "Session",
    "UnknownPrecision",
    "UnknownRuntime",
    "allowed_cpus",
    "cpu_model",
    "instruction_set",
    "is_busy",
    "location",
    "measure_interleaved",
    "median_bounds",
    "median_ratio",
    "open_runtime",
    "physical_cores",
    "ratio_confidence",
    "runtime_spec",
    "zero_randomly",
]
