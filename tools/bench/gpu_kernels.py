"""One layer at a time on an NVIDIA GPU: dense and 2:4 in every precision that PyTorch has kernels for.

    python -m onnx_spdy.tools.bench gpu-kernels --json kernels.json

Dense: bf16 and fp16 (cuBLAS), int8 (torch._int_mm) and fp8 (torch._scaled_mm, e4m3 with one scale a tensor). 2:4: the
fastest algorithm of cuSPARSELt in bf16, fp16 and int8. Results are in bf16 or fp16, but for dense int8, whose are
int32; nothing is quantised on the way, and no bias is added. Each time is the median of single runs whose weights and
activations come from memory (L2 overwritten before). What a kernel refuses is left out, with its reason. 2:4 in fp8 is
left out: on an H200, trying its algorithms took most of the minutes.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.mask import select_mask
from onnx_spdy.runtimes import SEMI_STRUCTURED
from onnx_spdy.runtimes.base import one_line
from onnx_spdy.runtimes.nvidia.cuda_device import Cuda, sparse_product
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.table import print_table

SHAPES = ((384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 16384), (16384, 4096))
ROWS = (128, 512, 1024, 4096, 8192, 32768)
MOST = 2**29  # elements of a result
RUNS, WARMUP = 30, 5
MINUTES = 5.0

Run = Callable[[], Any]


def bench(
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="MINUTES", help="after which no shape is begun")
    ] = MINUTES,
    json: Json = None,
) -> None:
    """Time the kernels; show them in a table."""
    device = Cuda()
    version, started = device.check(), time.monotonic()
    found: list[dict[str, Any]] = []
    for rows in ROWS:
        for before, after in SHAPES:
            if rows * after > MOST or time.monotonic() - started > 60 * time_limit:
                continue
            seconds, refused = measure(device, rows, before, after)
            found.append({"rows": rows, "in": before, "out": after, "seconds": seconds, "refused": refused})
            write_results(json, "bench_gpu_kernels", {"torch": version, "device": device.fields(), "layers": found})
    show(found)


def measure(device: Cuda, rows: int, before: int, after: int) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each kernel, and why others don't run."""
    seconds, refused = {}, {}
    for name, make in kernels(device, rows, before, after).items():
        try:
            runs = device.seconds(device.replayable(make()), WARMUP + RUNS, cold=True)[WARMUP:]
            seconds[name] = statistics.median(runs)
        except Exception as exc:  # kernels raise what they like; the others are still of interest
            torch.cuda.synchronize()
            refused[name] = one_line(str(exc), 160)
    return seconds, refused


def kernels(device: Cuda, rows: int, before: int, after: int) -> dict[str, Callable[[], Run]]:
    """Name -> what prepares x (rows, before) @ weight (after, before).T and returns its run."""
    generator = torch.Generator(device=device.place).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device.place)

    def dense(dtype: torch.dtype) -> Run:
        x, weight = drawn(rows, before).to(dtype), drawn(after, before).to(dtype)
        return lambda: torch.nn.functional.linear(x, weight)

    def dense_int8() -> Run:
        x, weight = (40 * drawn(rows, before)).to(torch.int8), (40 * drawn(after, before)).to(torch.int8)
        return lambda: torch._int_mm(x, weight.t())

    def dense_fp8() -> Run:
        x, weight = (drawn(*shape).to(torch.float8_e4m3fn) for shape in ((rows, before), (after, before)))
        one = torch.ones((), device=device.place)
        return lambda: torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    def sparse(dtype: torch.dtype, result: torch.dtype | None = None) -> Run:
        scale = 40 if dtype == torch.int8 else 1
        x, weight = (scale * drawn(rows, before)).to(dtype), (scale * two_in_four(drawn(after, before))).to(dtype)
        packed = torch._cslt_compress(weight)

        def product_of(algorithm: int) -> Callable[[Tensor], Tensor]:
            return sparse_product(packed, None, algorithm, result)

        return functools.partial(product_of(device.fastest(product_of, x)), x)

    return {
        "bf16": lambda: dense(torch.bfloat16),
        "fp16": lambda: dense(torch.float16),
        "fp8": dense_fp8,
        "int8": dense_int8,
        "2:4 bf16": lambda: sparse(torch.bfloat16),
        "2:4 fp16": lambda: sparse(torch.float16),
        "2:4 int8": lambda: sparse(torch.int8, torch.bfloat16),
    }


def two_in_four(weight: Tensor) -> Tensor:
    """(out, in) with the two smaller of every 4 inputs set to 0."""
    return weight * select_mask(weight.abs().cpu(), Level.parse(SEMI_STRUCTURED)).to(weight.device)


def show(layers: Sequence[Mapping[str, Any]]) -> None:
    """Print the times, and how many times as fast as bf16 each kernel is."""
    names = ("bf16", "fp16", "fp8", "int8", "2:4 bf16", "2:4 fp16", "2:4 int8")
    rows = []
    for layer in layers:
        seconds = layer["seconds"]
        cells = (
            f"{1e6 * seconds[name]:.1f} ({seconds['bf16'] / seconds[name]:.2f}x)" if name in seconds else "-"
            for name in names
        )
        rows.append((layer["rows"], f"{layer['in']} -> {layer['out']}", *cells))
    print_table("Microseconds, and times as fast as dense bf16", ("rows", "layer", *names), rows)
