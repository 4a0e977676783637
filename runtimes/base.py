"""What every runtime promises: its errors, the values it returns, and the two protocols."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from .errors import OnnxSpdyError
from .workload import Workload

Arrays = Mapping[str, np.ndarray]
Held = TypeVar("Held")
ANY_ZEROS = "unstructured"
FORMULA = "formula"  # instead of a precision, of a runtime whose times are computed


class RuntimeFailure(OnnxSpdyError, RuntimeError):
    """An engine did not do what it was asked to do."""


class RuntimeUnavailable(RuntimeFailure):
    """The engine can't be used here; the message says what is missing and what to do."""


class ModelRefused(RuntimeFailure):
    """The engine won't take the model; the message is its reason in one line."""


class EngineCrashed(RuntimeFailure):
    """The engine's process died; the message has its exit code or signal and its last words."""


class EngineHung(RuntimeFailure):
    """The engine's process gave no answer in the time allowed and was killed."""


class UnknownPrecision(OnnxSpdyError, ValueError):
    """A runtime isn't run in that precision; the message lists those there are."""


class UnknownRuntime(OnnxSpdyError, ValueError):
    """No runtime has that name; the message lists those there are."""


class MeasurementError(OnnxSpdyError, ValueError):
    """A measurement, or what is written of its environment, is damaged or too short for what is asked of it."""


@dataclass(frozen=True)
class Environment:
    """What a measurement depends on. Two measurements compare only if all but `host` agree."""

    runtime: str
    version: str
    precision: str  # "fp32", "bf16", "int8", ...; FORMULA for the test double
    cpu: str
    instruction_set: str  # the one that the engine uses, such as "avx512_vnni"
    cores: int  # physical cores that the process may use
    threads: int
    batch: int
    host: str
    options: tuple[tuple[str, str], ...] = ()  # whatever else changes the speed, such as NM_ARCH

    @property
    def is_formula(self) -> bool:
        """Whether its times are those of the test double, which say nothing of any engine."""
        return self.precision == FORMULA

    def to_json(self) -> dict[str, Any]:
        """This environment as a dict that `json.dumps` accepts."""
        return dataclasses.asdict(self) | {"options": dict(self.options)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Environment:
        """The environment that `to_json` wrote.

        Raises:
            MeasurementError: a field is missing or unknown; the message names it.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := known ^ set(document):
            raise MeasurementError(f"an environment with missing or unknown fields {sorted(wrong)}; measure again")
        options = tuple((str(key), str(value)) for key, value in document["options"].items())
        return cls(**{**document, "options": options})

    def mismatch(self, other: Environment) -> dict[str, tuple[Any, Any]]:
        """Field -> both values, of those that make measurements of the two environments incomparable."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "host")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: (ours, theirs) for name, (ours, theirs) in pairs.items() if ours != theirs}


@dataclass(frozen=True)
class LayerTime:
    """One row of an engine's own profile of one network.

    `outputs` are the ONNX output tensors that the row covers: one for a single layer, several where
    the engine merged layers, none for what belongs to no tensor (copies, layouts, fallback). The
    seconds of all rows of a profile add up to the engine's own time for the whole network.
    """

    outputs: tuple[str, ...]
    kernel: str  # the engine's name for it; see `dense_kernel` where it leaves zeros unused
    seconds: float  # mean over the profiled iterations
    sparse: bool  # a sparse kernel; False where the engine doesn't tell (merged rows)
    kernel_sparsity: float | None  # fraction of zeros that the engine saw; None where it doesn't tell


def dense_kernel(name: str, reason: str) -> str:
    """What `LayerTime.kernel` says of a layer that could be sparse by its zeros, but runs in a dense kernel.

    >>> reason_in(dense_kernel("cublas", "not picked"))
    'not picked'
    """
    return f"{name} [{reason}]"


def reason_in(kernel: str) -> str:
    """The reason that `dense_kernel` gave; empty where the name has none."""
    return kernel[kernel.index(" [") + 2 : -1] if " [" in kernel and kernel.endswith("]") else ""


class Session(Protocol):
    """One network, compiled for one batch and one number of threads; a context manager."""

    @property
    def environment(self) -> Environment:
        """What the times of this session depend on."""
        ...

    @property
    def fallback(self) -> str | None:
        """None when everything runs optimised, otherwise which part does not, and why, in one line."""
        ...

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name. `inputs` has every graph input, each with the session's batch.

        Raises:
            WorkloadError: an input is missing, unknown, or of another shape or type.
        """
        ...

    def seconds(self, iterations: int, warmup: int = 0) -> list[float]:
        """(iterations,) wall seconds of single runs on fixed inputs, timed inside the engine's process."""
        ...

    def close(self) -> None:
        """Release the engine's memory. May be called twice."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Runtime(Protocol):
    """An engine that runs ONNX files and tells how long it takes; a context manager.

    Making one does nothing: the engine is imported, or its process started, at the first call.
    """

    @property
    def name(self) -> str:
        """The name under which it is registered."""
        ...

    @property
    def usage(self) -> str:
        """Python that runs the file MODEL with the arrays INPUTS, name -> array, as `open` does, without this project.

        Empty where Python alone can't: `result` then isn't set.
        """
        ...

    @property
    def patterns(self) -> frozenset[str]:
        """Which zeros it has kernels for: "unstructured", which takes any zeros, and patterns that gain more than as
        many single zeros, such as "blockout4" or "2:4".

        Where empty, zeros can't make it faster.
        """
        ...

    def check(self) -> str:
        """The engine's version.

        Raises:
            RuntimeUnavailable: it can't be used here; the message says what to do.
        """
        ...

    def open(
        self,
        model: Path,
        workload: Workload,
        *,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Session:
        """Compile an ONNX file for one batch.

        Args:
            model: the file; a dynamic first axis of its inputs is fixed to the batch in a copy.
            workload: batch, threads, and arrays to time with.
            zeros: initializer name -> fraction of it to set to zero first, at random. An engine elsewhere gets the
                file once and draws the zeros itself, every time; the same ones as anywhere else.
            seed: of these zeros.
        Raises:
            ModelRefused: the file is missing or broken, has another fixed batch, or the engine won't take it.
            RuntimeUnavailable: the engine can't be used here.
            WorkloadError: the workload's inputs don't fit the graph.
            ValueError: `zeros` names no initializer that holds floats, or a fraction outside [0, 1].
        """
        ...

    def layer_seconds(
        self,
        model: Path,
        workload: Workload,
        *,
        iterations: int,
        warmup: int,
        zeros: Mapping[str, float] | None = None,
        seed: int = 0,
        merged: bool = True,
    ) -> list[LayerTime]:
        """One profile of an ONNX file by the engine's own profiler; other arguments and errors as in `open`.

        Args:
            iterations, warmup: profiled runs, and those before.
            merged: True is the network as `open` runs it. False asks an engine that merges layers not to, so that
                every layer has a row of its own and tells its kernel.
        """
        ...

    def foreign_cores(self) -> float | None:
        """Mean number of cores that other programs kept busy, where the engine runs, since the last call.

        The first call starts the count and returns 0. None where it can't be known. See `ForeignLoad`.
        """
        ...

    def close(self) -> None:
        """Release the engine's processes; sessions of this runtime end. May be called twice."""
        ...

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Closing:
    """`with` for a class that has `close`."""

    def close(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no close()")

    def __enter__(self):
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_precision(runtime: str, precision: str, known: Iterable[str]) -> None:
    """Raise UnknownPrecision where a runtime doesn't know that one."""
    names = list(known)
    if precision not in names:
        raise UnknownPrecision(f"{runtime} has no precision {precision!r}; there are {', '.join(names)}")


def check_iterations(iterations: int) -> None:
    """Raise ValueError where a profile has nothing to measure."""
    if iterations < 1:
        raise ValueError(f"a profile of {iterations} iterations; take at least 1")


def still_open(held: Held | None) -> Held:
    """What a session holds until it is closed; raises ValueError afterwards."""
    if held is None:
        raise ValueError("this session is closed; open the model again")
    return held


def one_line(text: str, limit: int = 300) -> str:
    """`text` with all white space collapsed, cut to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
