"""What an engine is asked to run: how many samples at a time, on how many threads, and which arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .errors import OnnxSpdyError
from .host import physical_cores

RANDOM = "random"  # in place of the inputs' shapes where none are given


class WorkloadError(OnnxSpdyError, ValueError):
    """Batch, threads or inputs that no engine can run, or inputs that don't fit the network."""


@dataclass(frozen=True, eq=False)
class Workload:
    """What a network is timed with.

    Attributes:
        batch: samples a run.
        threads: None for the physical cores that the process may use, wherever the engine runs.
        inputs: input name -> samples to time with, for some or all inputs. They lie on the axis that `batch_axes`
            names, most often the first, and are repeated where they are fewer than `batch`. Needed where another axis
            is dynamic; fixed random values are taken for inputs that aren't given.

    Raises:
        WorkloadError: `batch` or `threads` is less than 1.
    """

    batch: int
    threads: int | None = None
    inputs: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise WorkloadError(f"batch {self.batch}; a run takes at least 1 sample")
        if self.threads is not None and self.threads < 1:
            raise WorkloadError(f"{self.threads} threads; use at least 1, or None for the physical cores")

    @property
    def threads_or_cores(self) -> int:
        """`threads`, or one for each physical core that this process may use."""
        return self.threads or physical_cores()

    @property
    def shapes(self) -> str:
        """Names, types and shapes of the inputs, as text.

        >>> Workload(2, inputs={"ids": np.zeros((2, 128), np.int64)}).shapes
        'ids int64[2, 128]'
        """
        found = sorted((self.inputs or {}).items())
        return "; ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in found) or RANDOM

    @property
    def digest(self) -> str:
        """sha256 of `shapes`: equal where a network has the same work to do, whatever the values are.

        Where inputs are missing, or given in other numbers than they are run with, see `resolved` first.
        """
        return RANDOM if self.shapes == RANDOM else hashlib.sha256(self.shapes.encode()).hexdigest()
