"""Damaged and odd networks through the whole of `onnx-spdy run`: each ends in a pruned network or in one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_spdy.runtimes.atomic import WorkFolder
from onnx_spdy.tools.fuzz.child import Outcome, ended, import_everything
from onnx_spdy.tools.fuzz.damage import damaged
from onnx_spdy.tools.fuzz.graphs import example, examples
from onnx_spdy.tools.fuzz.inspect import write
from onnx_spdy.tools.fuzz.odd import odd
from onnx_spdy.tools.fuzz.setting import TINY

RUN = (
    "run", "model.onnx", "--data", "data.npz", "--runtime", "fake", "--batch", "256", "--speedup", "1.01",
    "--search-images", "200", "--out", "out",
)  # fmt: skip
OPTIONS: tuple[tuple[str, ...], ...] = (
    ("--pruner", "magnitude"), ("--search", "dp"), ("--finetune", "gap"), ("--eval", "data.npz"),
    ("--loss", "squared-error"), ("--loss", "kl"), ("--loss", "cross-entropy"), ("--pattern", "blockout2,2:4"),
    ("--pruner", "sparsegpt"), ("--search", "global-magnitude"), ("--batch", "1"), ("--search-samples", "3"),
)  # fmt: skip
SAMPLES = 24


def trials(count: int, seed: int, first: int = 0, keep: Path | None = None) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of `count` networks from number `first` on, every second of them damaged, the others odd but valid."""
    import_everything()
    networks = [*examples(), example(TINY, np.random.default_rng(0))]
    for number in range(first, first + count):
        rng = np.random.default_rng([seed, number])
        model = networks[number // 2 % len(networks)]
        if number % 2:
            files, what = damaged(model, rng), "damaged"
        else:
            files, what = odd(model, rng)
        chosen = [OPTIONS[one] for one in rng.permutation(len(OPTIONS))[: int(rng.integers(3))]]
        call = [*RUN, *(word for option in chosen for word in option)]
        with WorkFolder() as work:
            case = Path(work)
            write(files, case / "model.onnx")
            write_samples(model, rng, case / "data.npz")
            done = ended(call, case, case / "printed")
            if done.trouble and keep is not None:
                (keep / str(number)).mkdir(parents=True, exist_ok=True)
                write(files, keep / str(number) / "model.onnx")
                shutil.copyfile(case / "data.npz", keep / str(number) / "data.npz")
        what = f"{model.graph.name} {what} {' '.join(call[len(RUN) :])}"
        yield number, Outcome(done.trouble, done.became, done.text, what, done.seconds, done.memory_bytes)


def write_samples(model: onnx.ModelProto, rng: np.random.Generator, path: Path) -> None:
    """Random data for all inputs, and labels."""
    arrays: dict[str, Any] = {"target": rng.integers(0, 10, SAMPLES)}
    for value in model.graph.input:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        shape = [dim.dim_value or SAMPLES for dim in kind.shape.dim]
        arrays[value.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
    np.savez(path, **arrays)
