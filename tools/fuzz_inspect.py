"""Damaged ONNX files through `onnx-spdy inspect`: each ends in a list of layers or in one line, soon, in little memory.

    python -m onnx_spdy.tools.fuzz_inspect --count 2000 --seed 0 [MODEL.onnx ...]

Bytes are flipped, cut out, doubled; fields get values that they shouldn't have. A file that makes trouble is kept in
--keep, and `inspect` shows the trouble again.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

MEMORY_BYTES = 2 << 30
SECONDS = 10.0
KILLED_AFTER_SECONDS = 4 * SECONDS
NUMBERS = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 1000, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
NAMES = ("", "x", "y", "/", "../../outside", "a\nb", "\N{SNOWMAN}" * 3, "n" * 5000)
FOUND_IN_CHILD = {90: "traceback", 91: "several lines", 92: "wrote a file", 93: "silent failure"}


@dataclass(frozen=True)
class Outcome:
    """What became of one file; `trouble` is None when all was as it should be."""

    trouble: str | None
    accepted: bool
    seconds: float
    memory_bytes: int
    text: str


def examples() -> list[onnx.ModelProto]:
    """Small models with much in them: convolutions, shape arithmetic, attention-like products, a recurrent layer."""
    rng = np.random.default_rng(0)

    def stored(**shapes: tuple[int, ...]) -> list[TensorProto]:
        return [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]

    def numbers(**values: list[int]) -> list[TensorProto]:
        return [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in values.items()]

    def model(nodes, inputs, outputs, tensors, opset: int) -> onnx.ModelProto:
        def values(shapes):
            return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

        graph = helper.make_graph(nodes, "graph", values(inputs), values(outputs), tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)

    node = helper.make_node
    images = model(
        [
            node("Conv", ["x", "w1", "b1"], ["c"], "conv1", pads=[1, 1, 1, 1], strides=[2, 2], kernel_shape=[3, 3]),
            node("BatchNormalization", ["c", "s", "s", "s", "v"], ["n"], "norm"),
            node("Clip", ["n", "low", "high"], ["r"], "clip"),
            node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", ["p", "w2"], ["d"], "conv2", group=2),
            node("ReduceMean", ["d", "axes"], ["m"], "mean", keepdims=0),
            node("Gemm", ["m", "w3", "b3"], ["y"], "fc", transB=1, alpha=1.0),
        ],
        {"x": ["batch", 3, 16, 16]},
        {"y": ["batch", 20]},
        [
            *stored(w1=(16, 3, 3, 3), b1=(16,), s=(16,), w2=(16, 8, 1, 1), w3=(20, 16), b3=(20,)),
            *(
                numpy_helper.from_array(np.array(v, "f4"), n)
                for n, v in (("v", [1.0] * 16), ("low", 0.0), ("high", 6.0))
            ),
            *numbers(axes=[2, 3]),
        ],
        18,
    )
    sentences = model(
        [
            node("MatMul", ["x", "w"], ["a"], "qkv"),
            node("Split", ["a", "sizes"], ["q", "k", "v"], "split", axis=2),
            node("Shape", ["q"], ["shape"], "shape"),
            node("Slice", ["shape", "zero", "two", "zero"], ["first"], "slice"),
            node("Concat", ["first", "minus"], ["target"], "concat", axis=0),
            node("Reshape", ["q", "target"], ["q2"], "reshape"),
            node("Transpose", ["k"], ["kt"], "transpose", perm=[0, 2, 1]),
            node("MatMul", ["q2", "kt"], ["scores"], "scores"),
            node("Softmax", ["scores"], ["p"], "softmax", axis=-1),
            node("MatMul", ["p", "v"], ["m"], "mix"),
            node("ConstantOfShape", ["two"], ["zeros"], "fill"),
            node("LayerNormalization", ["m", "gain"], ["l"], "norm"),
            node("Transpose", ["l"], ["t"], "time", perm=[1, 0, 2]),
            node("GRU", ["t", "gw", "gr"], ["g", ""], "gru", hidden_size=8),
            node("ReduceSum", ["g", "one"], ["y"], "sum", keepdims=0),
        ],
        {"x": ["batch", 6, 16]},
        {"y": [6, "batch", 8], "zeros": [2]},
        [
            *stored(w=(16, 48), gain=(16,), gw=(1, 24, 16), gr=(1, 24, 8)),
            *numbers(sizes=[16, 16, 16], zero=[0], two=[2], minus=[-1], one=[1]),
        ],
        17,
    )
    return [images, sentences]


def mutated(model: onnx.ModelProto, rng: np.random.Generator) -> bytes:
    """The bytes of a damaged copy."""
    if rng.random() < 0.5:
        return _damaged_bytes(model.SerializeToString(), rng)
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for _ in range(int(rng.integers(1, 4))):
        _FIELDS[int(rng.integers(len(_FIELDS)))](copied, rng)
    return copied.SerializeToString()


def _damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    values, kind = bytearray(data), rng.integers(5)
    start = int(rng.integers(len(values)))
    # Weights are most of a file, and a changed weight is no damage: half of the places are near the structure's text.
    if rng.random() < 0.5:
        text = [i for i, byte in enumerate(values[:-1]) if byte == 0x0A]
        start = min(text[int(rng.integers(len(text)))] + int(rng.integers(4)), len(values) - 1)
    length = int(rng.integers(1, 1 + min(200, len(values) - start)))
    if kind == 0:
        for _ in range(int(rng.integers(1, 20))):
            values[int(rng.integers(len(values)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        values[start] = int(rng.integers(256))
    elif kind == 2:
        del values[start : start + length]
    elif kind == 3:
        values[start:start] = values[start : start + length]
    else:
        del values[start:]
    return bytes(values)


def _any(items, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _size_of_value(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    dims = _any([*model.graph.input, *model.graph.output], rng).type.tensor_type.shape.dim
    if dims:
        _any(dims, rng).dim_value = _any(NUMBERS, rng)


def _size_of_tensor(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    dims = _any(model.graph.initializer, rng).dims
    if dims:
        dims[int(rng.integers(len(dims)))] = _any(NUMBERS, rng)


def _numbers_of_tensor(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _any(model.graph.initializer, rng)
    kind = np.int64 if tensor.data_type == TensorProto.INT64 else np.float32
    array = np.frombuffer(tensor.raw_data, kind).copy()
    if array.size:
        array[int(rng.integers(array.size))] = _any(NUMBERS if kind is np.int64 else (np.nan, np.inf, 1e38), rng)
    tensor.raw_data = array.tobytes()


def _type_of_tensor(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    _any(model.graph.initializer, rng).data_type = int(rng.integers(-1, 40))


def _external_data(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _any(model.graph.initializer, rng)
    tensor.data_location = TensorProto.EXTERNAL
    location = _any(("../model.onnx", "/etc/passwd", "missing", "model.onnx", "", ".", "a\0b", "/dev/zero"), rng)
    for key, value in (("location", location), ("offset", _any(NUMBERS, rng)), ("length", _any(NUMBERS, rng))):
        if rng.random() < 0.8:
            tensor.external_data.add(key=key, value=str(value))


def _name_of_edge(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """A node reads or writes another value: cycles, duplicates, values from nowhere."""
    node = _any(model.graph.node, rng)
    names = node.input if rng.random() < 0.5 else node.output
    every = [name for other in model.graph.node for name in (*other.input, *other.output)]
    if names:
        names[int(rng.integers(len(names)))] = _any([*every, *NAMES], rng)


def _name(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    graph = model.graph
    _any([*graph.node, *graph.initializer, *graph.input, *graph.output], rng).name = _any(NAMES, rng)


def _operator(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _any(model.graph.node, rng)
    node.op_type = _any(
        ["Loop", "If", "Nothing", "", "Resize", "Tile", "Range", *(n.op_type for n in model.graph.node)], rng
    )


def _attribute(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    attributes = [item for node in model.graph.node for item in node.attribute]
    item = _any(attributes, rng)
    if item.ints:
        item.ints[int(rng.integers(len(item.ints)))] = _any(NUMBERS, rng)
    elif rng.random() < 0.5:
        item.i = _any(NUMBERS, rng)
    else:
        item.type = int(rng.integers(0, 15))


def _repeated(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    graph = model.graph
    items = _any([graph.node, graph.initializer, graph.input, graph.output], rng)
    if items and rng.random() < 0.5:
        items.add().CopyFrom(_any(items, rng))
    elif items:
        del items[int(rng.integers(len(items)))]


def _versions(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if rng.random() < 0.5:
        model.ir_version = _any(NUMBERS, rng)
    elif rng.random() < 0.5:
        model.opset_import[0].version = _any((*NUMBERS, 7, 11, 13, 23), rng)
    else:
        model.opset_import[0].domain = _any(NAMES, rng)


_FIELDS: list[Callable[[onnx.ModelProto, np.random.Generator], None]] = [
    _size_of_value, _size_of_tensor, _numbers_of_tensor, _type_of_tensor, _external_data, _name_of_edge, _name,
    _operator, _attribute, _repeated, _versions,
]  # fmt: skip


def inspected(data: bytes, folder: Path) -> Outcome:
    """Run `inspect` on these bytes in a process of its own, in an empty folder that it must leave as it is."""
    path = folder / "inside" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _inspect(path, folder / "output")
    overdue = False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > KILLED_AFTER_SECONDS and not overdue:
            overdue = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    seconds, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    code = os.waitstatus_to_exitcode(status)
    text = (folder / "output").read_text(encoding="utf8", errors="replace")
    strange = [str(p) for p in folder.rglob("*") if p.is_file() and p not in (path, folder / "output")]
    trouble = FOUND_IN_CHILD.get(code) if code in FOUND_IN_CHILD else None
    if overdue or seconds > SECONDS:
        trouble = "hang"
    elif code < 0:
        trouble = f"crash ({signal.Signals(-code).name})"
    elif memory > MEMORY_BYTES:
        trouble = "memory"
    elif strange:
        trouble = "wrote a file"
    elif trouble is None and code not in (0, 1):
        trouble = f"exit code {code}"
    return Outcome(trouble, code == 0, seconds, memory, text)


def _inspect(path: Path, output: Path) -> None:
    """In the child: `onnx-spdy inspect`, everything that it prints into `output`, and a verdict as exit code."""
    from onnx_spdy.tools.cli import main

    written: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            written.append(arguments[0])

    with output.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.chdir(path.parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)
    code, errors = 0, io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            main(["inspect", str(path)])
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException as exc:
        errors.write(f"Traceback: {type(exc).__name__}: {exc}")
        code = 90
    message = errors.getvalue()
    os.write(2, message.encode(errors="replace"))
    own = [name for name in written if not name.startswith("/dev/")]
    lines = [line for line in message.splitlines() if line.strip() and not line.startswith("WARNING")]
    if own:
        os.write(2, f"\nwrote {own}".encode())
        code = 92
    elif code == 1:
        code = 93 if not lines else 91 if len(lines) > 1 else 90 if "Traceback" in message else 1
    os._exit(code)


def fuzz(
    models: Sequence[onnx.ModelProto], count: int, seed: int, workers: int = 1, keep: Path | None = None
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of `count` damaged files; the file with a number is the same in every run with the same seed."""
    import onnxruntime  # noqa: F401  # before the forks: imported once instead of in each
    import onnxslim  # noqa: F401
    import torch

    import onnx_spdy.tools.cli  # noqa: F401

    torch.set_num_threads(1)

    def one(number: int) -> tuple[int, Outcome]:
        rng = np.random.default_rng([seed, number])
        data = mutated(models[number % len(models)], rng)
        with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
            outcome = inspected(data, Path(folder) / "case")
        if outcome.trouble and keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{number}.onnx").write_bytes(data)
        return number, outcome

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, range(count))


def main(
    models: Annotated[list[Path] | None, typer.Argument(metavar="MODEL.onnx")] = None,
    count: int = 2000,
    seed: int = 0,
    workers: int = 1,
    keep: Path | None = None,
) -> None:
    """Print every file that makes trouble, and the counts."""
    found, slowest, largest = Counter[str](), 0.0, 0
    chosen = [onnx.load(path) for path in models] if models else examples()
    for number, outcome in fuzz(chosen, count, seed, workers, keep):
        found[outcome.trouble or ("accepted" if outcome.accepted else "refused in one line")] += 1
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.memory_bytes)
        if outcome.trouble:
            print(f"{number}: {outcome.trouble}: {' '.join(outcome.text.split())[-300:]}", flush=True)
    print(f"{count} files, seed {seed}: " + ", ".join(f"{n} {what}" for what, n in found.most_common()))
    print(f"slowest {slowest:.1f} s of CPU time, largest {largest / 2**20:.0f} MiB")
    raise SystemExit(any(what not in ("accepted", "refused in one line") for what in found))


if __name__ == "__main__":
    typer.run(main)
