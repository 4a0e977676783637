"""The GPU as `cusparselt.py` uses it: its clock, its graphs, its 2:4 kernels. Run on an H200.

Everything that needs the device is in here, so that the rest is tested with a stand-in for it.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from .. import host
from ..base import ModelRefused, RuntimeUnavailable, one_line

OLDEST = (8, 0)  # compute capability with sparse tensor cores
WARM_SECONDS = 0.3
IDLE_SECONDS = 1.0  # after which the clocks have to be warmed again
RUNS_BEFORE_CAPTURE = 3
FLUSH_FACTOR = 2  # times the size of the L2 cache
CUSPARSELT = "cusparselt"
MOST_ALGORITHMS = 28  # cuSPARSELt 0.8 has 21 in bf16, 28 in int8
RUNS_AN_ALGORITHM = 9
ROWS = 8  # cuSPARSELt takes rows of activations by this multiple

Run = Callable[[], Any]
Product = Callable[[Any], Any]


class Device(Protocol):
    """What a runtime in PyTorch needs of the accelerator; tests have one on the CPU."""

    @property
    def place(self) -> Any:
        """Where tensors go, as PyTorch takes it."""
        ...

    def check(self) -> str:
        """The engine's version; raises RuntimeUnavailable where it can't be used."""
        ...

    def fields(self) -> dict[str, Any]:
        """What an `Environment` says of the machine, `options` included."""
        ...

    def replayable(self, run: Run) -> Run:
        """`run` as one launch; its tensors stay where they are."""
        ...

    def compiled(self, graph: Any) -> Any:
        """A torch.fx.GraphModule with its operators fused."""
        ...

    def seconds(self, replay: Run, iterations: int, *, cold: bool = False) -> list[float]:
        """(iterations,) seconds of single runs on the device; cold: with nothing in its caches."""
        ...

    def marked_seconds(self, run: Callable[[Run], Any], iterations: int, warmup: int) -> list[list[float]]:
        """(iterations, marks - 1) seconds between the calls of `run`'s argument, which calls it as often every time."""
        ...

    def sparse_products(self, weight: Any, bias: Any, sample: Any) -> Iterator[tuple[str, Product]]:
        """Kernels for x (rows, in) -> x @ weight.T + bias (rows, out), by name.

        Args:
            weight: (out, in), 2:4, on the device.
            bias: (out,) or None.
            sample: (rows, in) an x, of the shape to come.
        """
        ...


class Cuda:
    """The current CUDA device, through PyTorch.

    Args:
        engine: the runtime that uses it; cuSPARSELt is needed by that runtime only.
    """

    place = "cuda"

    def __init__(self, engine: str = CUSPARSELT) -> None:
        self._engine = engine
        self._used = -math.inf
        self._scratch: Any = None
        self._algorithms: dict[tuple[Any, ...], int] = {}  # by shape of weight and activations, and type

    def check(self) -> str:
        """See `Device.check`."""
        torch = _import_torch()
        version = str(torch.__version__)
        if torch.version.cuda is None:
            raise RuntimeUnavailable(
                f"{self._engine} needs a CUDA build of PyTorch, this is torch {version} without CUDA"
            )
        if not torch.cuda.is_available():
            raise RuntimeUnavailable(f"{self._engine} needs an NVIDIA GPU; torch {version} finds none, nor its driver")
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST:
            raise RuntimeUnavailable(
                f"{self._engine} needs compute capability {OLDEST[0]}.{OLDEST[1]} for 2:4, "
                f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
            )
        if self._engine == CUSPARSELT and not torch.backends.cusparselt.is_available():
            raise RuntimeUnavailable(f"torch {version} comes without cuSPARSELt; take a build for CUDA on Linux x86-64")
        return version

    def fields(self) -> dict[str, Any]:
        """See `Device.fields`."""
        torch = _import_torch()
        major, minor = torch.cuda.get_device_capability()
        is_sparse = self._engine == CUSPARSELT
        libraries = ((CUSPARSELT, str(torch.backends.cusparselt.version())),) if is_sparse else ()
        return {
            **host.fields(),
            "cpu": torch.cuda.get_device_name(),
            "instruction_set": f"sm_{major}{minor}",
            "options": (("cuda", str(torch.version.cuda)), *libraries),
        }

    def replayable(self, run: Run) -> Run:
        """See `Device.replayable`: a CUDA graph."""
        torch = _import_torch()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Libraries allocate at their first call, which a graph can't hold; cuDNN tries its algorithms then.
        with torch.cuda.stream(stream), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            for _ in range(RUNS_BEFORE_CAPTURE):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph), torch.backends.cudnn.flags(enabled=True, benchmark=True):
                kept = run()
        except RuntimeError as exc:
            raise ModelRefused(
                f"the network can't be captured in a CUDA graph ({one_line(str(exc), 120)}); export it with fixed "
                "shapes, so that nothing is computed on the CPU"
            ) from exc

        def replay(graph: Any = graph, kept: Any = kept) -> Any:
            graph.replay()
            return kept

        return replay

    def compiled(self, graph: Any) -> Any:
        """See `Device.compiled`: torch.compile, whose kernels Triton makes."""
        return _import_torch().compile(graph, fullgraph=True, dynamic=False)

    def seconds(self, replay: Run, iterations: int, *, cold: bool = False) -> list[float]:
        """See `Device.seconds`: time on the GPU by events. Launches run ahead of it, as they do in a server."""
        torch = _import_torch()
        self._warm()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
        for start, end in pairs:
            if cold:
                self._flush()
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        self._used = time.monotonic()
        return [1e-3 * start.elapsed_time(end) for start, end in pairs]

    def marked_seconds(self, run: Callable[[Run], Any], iterations: int, warmup: int) -> list[list[float]]:
        """See `Device.marked_seconds`: events that are nodes of the CUDA graph, so that nothing waits for the CPU."""
        torch = _import_torch()
        events: list[Any] = []

        def captured() -> None:
            events.clear()

            def mark() -> None:
                events.append(torch.cuda.Event(enable_timing=True, external=True))
                events[-1].record()

            run(mark)

        replay = self.replayable(captured)
        self._warm()
        found = []
        for number in range(warmup + iterations):
            replay()
            torch.cuda.synchronize()  # the next replay would overwrite the events
            if number >= warmup:
                found.append([1e-3 * one.elapsed_time(other) for one, other in itertools.pairwise(events)])
        self._used = time.monotonic()
        return found

    def sparse_products(self, weight: Any, bias: Any, sample: Any) -> Iterator[tuple[str, Product]]:
        """See `Device.sparse_products`: the fastest of cuSPARSELt's algorithms at these shapes, with cold caches.

        Its own search times few runs, with warm caches; its default is up to 2.4 times as slow as the best (H200). The
        result is written as the next operator reads it, (rows, out): the other way round it would be copied later.
        """
        torch = _import_torch()
        packed = torch._cslt_compress(weight.contiguous())
        key = (tuple(weight.shape), len(sample), weight.dtype, bias is None)
        if key not in self._algorithms:
            self._algorithms[key] = self.fastest(functools.partial(sparse_product, packed, bias), sample)
        algorithm = self._algorithms[key]
        yield f"cusparselt_2:4 algorithm {algorithm}", sparse_product(packed, bias, algorithm)

    def fastest(self, product_of: Callable[[int], Product], sample: Any) -> int:
        """The number of the algorithm that computes a product of this sample fastest, with cold caches."""
        torch = _import_torch()
        seconds: dict[int, float] = {}
        for algorithm in range(MOST_ALGORITHMS):
            product = product_of(algorithm)
            try:
                replay = self.replayable(functools.partial(product, sample))
            except (RuntimeError, ModelRefused):
                if algorithm:  # there are no more, or not for these shapes
                    torch.cuda.synchronize()
                    continue
                raise
            seconds[algorithm] = statistics.median(self.seconds(replay, RUNS_AN_ALGORITHM, cold=True))
        return min(seconds, key=lambda algorithm: seconds[algorithm])

    def _warm(self) -> None:
        """Bring an idle GPU to its clocks under load."""
        torch = _import_torch()
        if time.monotonic() - self._used < IDLE_SECONDS:
            return
        square = torch.ones(4096, 4096, dtype=torch.float16, device=self.place)
        until = time.monotonic() + WARM_SECONDS
        while time.monotonic() < until:
            square @ square
            torch.cuda.synchronize()

    def _flush(self) -> None:
        """Overwrite the L2 cache."""
        torch = _import_torch()
        if self._scratch is None:
            size = FLUSH_FACTOR * torch.cuda.get_device_properties().L2_cache_size
            self._scratch = torch.empty(size, dtype=torch.int8, device=self.place)
        self._scratch.zero_()


def sparse_product(packed: Any, bias: Any, algorithm: int, result: Any = None) -> Product:
    """x (rows, in) -> x @ weight.T + bias (rows, out), in one of cuSPARSELt's algorithms.

    Args:
        packed: the weight (out, in) as torch._cslt_compress makes it.
        bias: (out,) or None.
        result: the type of the output, where it isn't that of x.
    """
    torch = _import_torch()

    def product(x: Any) -> Any:
        rows = len(x)
        padded = torch.nn.functional.pad(x.contiguous(), (0, 0, 0, -rows % ROWS)) if rows % ROWS else x.contiguous()
        found = torch._cslt_sparse_mm(
            packed, padded.t(), bias=bias, out_dtype=result, transpose_result=True, alg_id=algorithm
        )
        return found[:rows] if rows % ROWS else found

    return product


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as exc:
        raise RuntimeUnavailable(f"torch can't be imported ({one_line(str(exc))}); install PyTorch for CUDA") from exc
    return torch
