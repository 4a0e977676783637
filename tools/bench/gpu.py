"""2:4 on a GPU, in one go: transformer encoders dense, all 2:4 and selective, by layer and as a whole.

    python -m onnx_spdy.tools.bench gpu --json gpu.json

For each encoder, sequence and batch: what every layer takes dense (cuBLAS) and 2:4 (cuSPARSELt), in the network and by
itself with cold caches, also where 2:4 is slower; then the network with 2:4 everywhere, and with 2:4 only in the
layers that it makes faster, whose time is predicted from the first two before it is measured. Weights are random: the
times don't depend on them. The file, some kilobytes for each case, is written again as soon as a case is measured; no
case is begun after --time-limit.

It needs an NVIDIA GPU from compute capability 8.0 on, Python 3.10 or later, and there torch 2.8 or later for CUDA with
cuSPARSELt, numpy, onnx, onnxscript, ml_dtypes and typer; nothing else of what this project depends on. Where the
project isn't installed, a folder `onnx_spdy` with links to models, runtimes, pipeline and tools on PYTHONPATH does, as
the Makefile makes it for `make types`; where onnx or typer is missing, its wheels unpacked into a folder on PYTHONPATH.
--dry-run is for machines without a GPU: one tiny encoder on the CPU, whose times mean nothing. Run on an H200; its
figures are in `tests/golden/h200_bf16`.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import Layer, find_layers, from_canonical, save_model, to_canonical
from onnx_spdy.pipeline.engine import READER
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.mask import select_mask
from onnx_spdy.runtimes import SEMI_STRUCTURED, LayerTime, Measurement, Workload, measure_interleaved, median_ratio
from onnx_spdy.runtimes.nvidia.cpu_device import CpuDevice
from onnx_spdy.runtimes.nvidia.cuda_device import Device
from onnx_spdy.runtimes.nvidia.cusparselt import CuSparseLt, CuSparseLtSession
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.table import print_table

OPSET = 17
ROUNDS, RUNS_A_ROUND, WARMUP = 30, 3, 10
PROFILED = 50
GAIN = 0.01  # of its time, which a layer has to win to be 2:4 in the selective network
MINUTES = 9.0


@dataclass(frozen=True)
class Case:
    """An encoder of the BERT kind, and what it is run on."""

    name: str
    layers: int
    hidden: int
    heads: int
    sequence: int
    batch: int

    def __str__(self) -> str:
        return f"{self.name} sequence {self.sequence} batch {self.batch}"


CASES = (
    *(Case("bert_base", 12, 768, 12, sequence, batch) for sequence in (128, 512) for batch in (1, 8, 64)),
    *(Case("hidden_4096", 1, 4096, 32, sequence, batch) for sequence in (128, 512) for batch in (1, 8, 64)),
)
TINY = (Case("tiny", 2, 64, 4, 16, 2),)


def bench(
    case: Annotated[str, typer.Option("--case", metavar="TEXT", help="only cases that have that in their name")] = "",
    precision: Annotated[str, typer.Option("--precision", metavar="P[,P]", help="bf16, fp16 or both")] = "bf16",
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="MINUTES", help="after which no case is begun")
    ] = MINUTES,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="a tiny encoder on the CPU; its times mean nothing")
    ] = False,
    json: Json = None,
) -> None:
    """Measure the cases; show the layers and the networks of each."""
    device = CpuDevice() if dry_run else None
    started, found = time.monotonic(), []
    chosen = [one for one in (TINY if dry_run else CASES) if case in str(one)]
    for kind, one in itertools.product(precision.split(","), chosen):
        if time.monotonic() - started > 60 * time_limit:
            print(f"{time_limit:g} minutes are over: {one} in {kind} and what follows isn't measured")
            break
        found.append(measure(one, kind, device))
        write_results(json, "bench_gpu", {"cases": found})
        show_layers(found[-1])
    show_networks(found)


def measure(case: Case, precision: str, device: Device | None = None) -> dict[str, Any]:
    """Everything about one case.

    Args:
        device: a stand-in for the GPU.
    """
    model = encoder(case)
    layers = [layer for layer in find_layers(model) if layer.prunable]
    with (
        tempfile.TemporaryDirectory(prefix="onnx-spdy-") as folder,
        CuSparseLt(precision, reader=READER, pick=False, device=device) as runtime,
    ):

        def opened(name: str, sparse: Sequence[Layer]) -> CuSparseLtSession:
            path = Path(folder) / f"{name}.onnx"
            save_model(semi_structured(model, sparse), path)
            return runtime.open(path, Workload(case.batch))

        dense, all_sparse = opened("dense", ()), opened("all", layers)
        rows = {name: profile(one) for name, one in (("dense", dense), ("2:4", all_sparse))}
        faster = [one for one in layers if gain(rows, one) > GAIN * rows["dense"][one.output].seconds]
        sessions = {"dense": dense, "all 2:4": all_sparse, "selective": opened("selective", faster)}
        times = measure_interleaved(sessions, rounds=ROUNDS, iterations=RUNS_A_ROUND, warmup=WARMUP)
        share = 1 - sum(gain(rows, one) for one in faster) / sum(row.seconds for row in rows["dense"].values())
        content = {
            "case": asdict(case),
            "precision": precision,
            "engine": dense.environment.to_json(),
            "conditions": "layers: in the network's CUDA graph; cold: by itself, L2 overwritten; networks: in turns",
            "layers": [_row(one, rows, all_sparse, one in faster) for one in layers],
            "networks": {name: _network(times["dense"], one) for name, one in times.items()},
            "selective_predicted_seconds": share * times["dense"].median,
        }
        for session in sessions.values():
            session.close()
    return content


def profile(session: CuSparseLtSession) -> dict[str, LayerTime]:
    """First output tensor -> row of the profile; casts at the border have no tensor, and are left out."""
    return {row.outputs[0]: row for row in session.layer_seconds(PROFILED, WARMUP) if row.outputs}


def gain(rows: Mapping[str, Mapping[str, LayerTime]], layer: Layer) -> float:
    """Seconds that 2:4 wins in a layer; negative where it is slower."""
    return rows["dense"][layer.output].seconds - rows["2:4"][layer.output].seconds


def semi_structured(model: onnx.ModelProto, layers: Sequence[Layer]) -> onnx.ModelProto:
    """The model with the smaller half of every 4 input channels of these layers set to 0."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in copy.graph.initializer}
    for layer in layers:
        weight = to_canonical(layer, numpy_helper.to_array(stored[layer.weight]))
        keep = select_mask(torch.from_numpy(np.abs(weight)), Level.parse(SEMI_STRUCTURED)).numpy()
        kept = np.ascontiguousarray(from_canonical(layer, np.where(keep, weight, np.float32(0))))
        stored[layer.weight].CopyFrom(numpy_helper.from_array(kept, layer.weight))
    return copy


def encoder(case: Case) -> onnx.ModelProto:
    """An encoder as exporters write it: MatMul and Add for every linear layer, GELU by Erf, no mask."""
    rng = np.random.default_rng(0)
    size = case.hidden // case.heads
    shape = np.array([0, 0, case.heads, size])
    constants = {
        "heads": shape, "joined": np.array([0, 0, case.hidden]), "scale": np.array(np.sqrt(size), np.float32),
        "root2": np.array(np.sqrt(2), np.float32), "one": np.array(1, np.float32), "half": np.array(0.5, np.float32),
    }  # fmt: skip
    arrays: dict[str, np.ndarray] = dict(constants)
    nodes: list[onnx.NodeProto] = []

    def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, [*inputs], [output], output, **attributes))
        return output

    def linear(x: str, name: str, before: int, after: int) -> str:
        arrays[f"{name}.weight"] = (rng.random((before, after), np.float32) - 0.5) * np.float32(3 / np.sqrt(before))
        arrays[f"{name}.bias"] = (rng.random(after, np.float32) - 0.5) * np.float32(0.1)
        return node("Add", [node("MatMul", [x, f"{name}.weight"], f"{name}.product"), f"{name}.bias"], name)

    def normalised(x: str, y: str, name: str) -> str:
        arrays[f"{name}.scale"], arrays[f"{name}.shift"] = (
            np.ones(case.hidden, np.float32),
            np.zeros(case.hidden, np.float32),
        )
        added = node("Add", [x, y], f"{name}.sum")
        return node("LayerNormalization", [added, f"{name}.scale", f"{name}.shift"], name, axis=-1)

    def split(x: str, name: str, order: Sequence[int]) -> str:
        return node("Transpose", [node("Reshape", [x, "heads"], f"{name}.heads")], f"{name}.split", perm=order)

    x = "input"
    for number in range(case.layers):
        at = f"layer{number}"
        query, key, value = (linear(x, f"{at}.{name}", case.hidden, case.hidden) for name in ("query", "key", "value"))
        scores = node("MatMul", [split(query, query, (0, 2, 1, 3)), split(key, key, (0, 2, 3, 1))], f"{at}.scores")
        weights = node("Softmax", [node("Div", [scores, "scale"], f"{at}.scaled")], f"{at}.weights", axis=-1)
        mixed = node("MatMul", [weights, split(value, value, (0, 2, 1, 3))], f"{at}.mixed")
        joined = node("Transpose", [mixed], f"{at}.back", perm=(0, 2, 1, 3))
        joined = node("Reshape", [joined, "joined"], f"{at}.joined")
        x = normalised(linear(joined, f"{at}.attended", case.hidden, case.hidden), x, f"{at}.norm1")
        inner = linear(x, f"{at}.inner", case.hidden, 4 * case.hidden)
        error = node("Erf", [node("Div", [inner, "root2"], f"{at}.divided")], f"{at}.erf")
        gated = node("Mul", [inner, node("Add", [error, "one"], f"{at}.plus")], f"{at}.gated")
        halved = node("Mul", [gated, "half"], f"{at}.gelu")
        x = normalised(linear(halved, f"{at}.outer", 4 * case.hidden, case.hidden), x, f"{at}.norm2")
    nodes[-1].output[0] = "output"
    declared = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, case.name, [declared("input", TensorProto.FLOAT, ["batch", case.sequence, case.hidden])],
        [declared("output", TensorProto.FLOAT, ["batch", case.sequence, case.hidden])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def _row(
    layer: Layer, rows: Mapping[str, Mapping[str, LayerTime]], session: CuSparseLtSession, chosen: bool
) -> dict[str, Any]:
    alone = session.choices[layer.output]
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "dense_seconds": rows["dense"][layer.output].seconds,
        "sparse_seconds": rows["2:4"][layer.output].seconds,
        "cold_dense_seconds": alone.dense_seconds,
        "cold_sparse_seconds": alone.sparse_seconds,
        "kernel": alone.kernel,
        "selective": chosen,
    }


def _network(dense: Measurement, one: Measurement) -> dict[str, float]:
    speedup, error = median_ratio(dense.seconds, one.seconds)
    return {"median_seconds": one.median, "spread": one.spread, "speedup": speedup, "speedup_error": error}


def show_layers(content: Mapping[str, Any]) -> None:
    """Print what each layer takes."""
    times = ("dense_seconds", "sparse_seconds", "cold_dense_seconds", "cold_sparse_seconds")
    print_table(
        f"{Case(**content['case'])} in {content['precision']}",
        ("layer", "dense us", "2:4 us", "cold dense us", "cold 2:4 us", "speedup", "in selective", "kernel"),
        [(layer["name"], *(f"{1e6 * layer[key]:.1f}" for key in times),
          f"{layer['dense_seconds'] / layer['sparse_seconds']:.2f}", "2:4" if layer["selective"] else "dense",
          layer["kernel"]) for layer in content["layers"]],
    )  # fmt: skip


def show_networks(cases: Sequence[Mapping[str, Any]]) -> None:
    """Print what the whole networks take, and how well the selective one was predicted."""
    rows = []
    for content in cases:
        networks, predicted = content["networks"], content["selective_predicted_seconds"]
        times = (f"{1e6 * one['median_seconds']:.1f} ({one['speedup']:.3f}x)" for one in networks.values())
        chosen = f"{sum(layer['selective'] for layer in content['layers'])} of {len(content['layers'])}"
        off = predicted / networks["selective"]["median_seconds"] - 1
        rows.append(
            (
                f"{Case(**content['case'])} {content['precision']}",
                *times,
                chosen,
                f"{1e6 * predicted:.1f}",
                f"{off:+.1%}",
            )
        )
    columns = ("encoder", "dense us", "all 2:4 us", "selective us", "layers that gain", "predicted us", "off")
    print_table("Networks", columns, rows)
