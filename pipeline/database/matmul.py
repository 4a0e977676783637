"""Float32 matrix products as fast as this CPU has them.

On AMD's CPUs torch multiplies float32 with half of their vector width; oneDNN, which comes with torch, uses all of it,
but is asked only where the caller allows it to round to bfloat16. On CPUs without AMX it has no use for that leave and
computes the same float32 product in half the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch

LARGEST_ERROR = 1e-5  # relative: tens of times what float32 loses, and a hundredth of what bfloat16 does


@contextlib.contextmanager
def fast_float32() -> Iterator[None]:
    """Products of float32 matrices on the CPU use oneDNN in this context or function, where that rounds nothing."""
    if not _is_exact():
        yield
        return
    with _rounding_allowed():
        yield


@cache
def _is_exact() -> bool:
    """Whether oneDNN, when it may round to bfloat16, computes in float32 all the same; it is tried on one product."""
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and hasattr(mkldnn, "matmul") and hasattr(torch.cpu, "get_capabilities")):
        return False  # torch 2.9 can't tell whether there is AMX
    if torch.cpu.get_capabilities().get("amx_bf16"):
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    with _rounding_allowed():
        product = left @ right
    return float((product - exact).norm() / exact.norm()) < LARGEST_ERROR


@contextlib.contextmanager
def _rounding_allowed() -> Iterator[None]:
    precision = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made when torch is imported
    before = precision.fp32_precision
    precision.fp32_precision = "bf16"
    try:
        yield
    finally:
        precision.fp32_precision = before
