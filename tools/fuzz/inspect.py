"""One damaged file through `onnx-spdy inspect`, in a process of its own, and what became of it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from onnx_spdy.runtimes.atomic import WORK, WorkFolder
from onnx_spdy.tools.fuzz.child import Outcome, command, import_everything, start, wait
from onnx_spdy.tools.fuzz.damage import DATA_FILE, Files, damaged

MEMORY_BYTES = 2 << 30
SECONDS = 10.0
WROTE = 91  # exit code


def inspected(files: Files, folder: Path) -> Outcome:
    """Run `inspect` on a model in a process of its own, in a folder that it must leave as it is."""
    path = folder / "inside" / "model.onnx"
    path.parent.mkdir(parents=True)
    given = write(files, path)
    done = wait(start(_watched(command(["inspect", str(path)], path.parent)), folder / "output"), folder / "output")
    printed = [(folder / "output").with_suffix(suffix) for suffix in (".out", ".err")]
    strange = [str(p) for p in folder.rglob("*") if p.is_file() and p not in (*given, *printed)]
    trouble = done.trouble
    if done.overdue or done.seconds > SECONDS:
        trouble = "hang"
    elif done.code >= 0 and done.memory_bytes > MEMORY_BYTES:
        trouble = "memory"
    elif done.code == WROTE or strange:
        trouble = "wrote a file"
    elif trouble is None and done.code not in (0, 1):
        trouble = f"exit code {done.code}"
    return Outcome(trouble, done.became, done.text, "", done.seconds, done.memory_bytes)


def write(files: Files, path: Path) -> list[Path]:
    """Put a model at a path and its data beside it; returns what was written."""
    path.write_bytes(files.model)
    if files.data is None:
        return [path]
    path.with_name(DATA_FILE).write_bytes(files.data)
    return [path, path.with_name(DATA_FILE)]


def _watched(work: Callable[[], int]) -> Callable[[], int]:
    """The same, with another exit code when it leaves a file anywhere."""

    def watched() -> int:
        written: list[str] = []

        def watch(event: str, arguments: tuple) -> None:
            if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                written.append(arguments[0])

        sys.addaudithook(watch)
        code = work()
        own = f"{tempfile.gettempdir()}/{WORK}"  # folders of ours, where graphs are tried; they have to be gone now
        left = [name for name in written if not name.startswith(own) or Path(name).exists()]
        if left := [name for name in left if not name.startswith("/dev/")]:
            print(f"wrote {left}", file=sys.stderr)
            return WROTE
        return code

    return watched


def fuzz(
    models: Sequence[onnx.ModelProto],
    count: int,
    seed: int,
    first: int = 0,
    workers: int = 1,
    keep: Path | None = None,
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of `count` damaged files from number `first` on; a number's file is the same in every run of a seed."""
    import_everything()

    def one(number: int) -> tuple[int, Outcome]:
        rng = np.random.default_rng([seed, number])
        files = damaged(models[number % len(models)], rng)
        with WorkFolder() as folder:
            outcome = inspected(files, Path(folder) / "case")
        if outcome.trouble and keep is not None:
            (keep / f"{number}").mkdir(parents=True, exist_ok=True)
            write(files, keep / f"{number}" / "model.onnx")
        return number, replace(outcome, what=f"example {number % len(models)}")

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, range(first, first + count))
