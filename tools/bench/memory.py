"""What the steps take in memory and time for decoders of several sizes, and how that grows with the number of weights.

Each step is a command of its own in a process of its own, whose memory is looked at while it runs: what is resident in
it and in the processes that it starts, and the part of that which isn't a file's. Pages of a file that is mapped are
resident while they are used, but the system takes them back when it needs them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from onnx_spdy.pipeline.database.layer_database import open_database
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.runtimes.errors import OnnxSpdyError
from onnx_spdy.tools.bench.decoder import SIZES, random_tokens, write_decoder
from onnx_spdy.tools.options import PrunerName, Seed, several
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.table import print_table

STEPS = ("inspect", "prepare", "database", "deploy")
PATTERN = "2:4,unstructured@0.5"
LOOK_SECONDS = 0.02  # between two looks at a step's memory
STOPPED_SECONDS = 5.0  # looks that are further apart have this process stopped between them, and its steps too


class StepFailed(OnnxSpdyError, RuntimeError):
    """A step ended with an error."""


@dataclass(frozen=True)
class Row:
    """One step for one decoder.

    Attributes:
        weights: of the decoder.
        seconds: of the whole command.
        resident_bytes: the most that its processes held together, a page that two of them map twice.
        anonymous_bytes: the most of that which isn't a page of a file.
    """

    network: str
    weights: int
    step: str
    seconds: float
    resident_bytes: int
    anonymous_bytes: int


def bench(
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="N[,N...]", help=f"of {', '.join(SIZES)}")
    ] = "tiny,125m,350m",
    steps: Annotated[str, typer.Option("--steps", metavar="S[,S...]", help="those that are run")] = ",".join(STEPS),
    pruner: PrunerName = DEFAULT_PRUNER,
    samples: Annotated[int, typer.Option("--samples", min=1, help="of calibration")] = 8,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="keep the files there")] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Run the steps for decoders of these sizes; show their memory and time, and how both grow."""
    rows: list[Row] = []
    names = several(sizes, _known(SIZES, "size"), "--sizes")
    wanted = several(steps, _known(STEPS, "step"), "--steps")
    with ProgressBars() as bars, tempfile.TemporaryDirectory(prefix="onnx-spdy-") as temporary:
        for number, name in enumerate(names):
            folder = (out or Path(temporary)) / name
            make(name, folder, samples, seed)
            for step in wanted:
                rows.append(measure(name, step, folder, pruner))
                write_results(json, "bench_memory", {"pruner": pruner, "rows": [asdict(row) for row in rows]}, seed)
                bars.stage("memory")(number * len(wanted) + wanted.index(step) + 1, len(names) * len(wanted), name)
    show(rows)


def _known(names: Collection[str], what: str) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in names:
            raise typer.BadParameter(f"unknown {what} {name!r}; known: {', '.join(names)}")
        return name

    return check


def make(name: str, folder: Path, samples: int, seed: int) -> None:
    """The decoder and its calibration samples in a folder, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data.npz").exists():
        write_decoder(SIZES[name], folder / "model.onnx", seed)
        np.savez(folder / "data.npz", input_ids=random_tokens(SIZES[name], samples, seed))


def measure(name: str, step: str, folder: Path, pruner: str) -> Row:
    """Run one step of a decoder whose earlier steps are done."""
    if step == "deploy":
        every_layer_pruned(folder / "database").save(folder / "profile.json")
    model, data, database = (str(folder / file) for file in ("model.onnx", "data.npz", "database"))
    arguments = {
        "inspect": [model],
        "prepare": [model, "--data", data, "--out", str(folder / "dense.onnx")],
        "database": [model, "--data", data, "--pattern", PATTERN, "--pruner", pruner, "--out", database],
        "deploy": [model, "--database", database, "--profile", str(folder / "profile.json"),
                   "--out", str(folder / "pruned.onnx")],
    }[step]  # fmt: skip
    seconds, resident, anonymous = watched([sys.executable, "-m", "onnx_spdy.tools.cli", step, *arguments])
    return Row(name, SIZES[name].weights, step, seconds, resident, anonymous)


def every_layer_pruned(folder: Path) -> Profile:
    """A profile that has each layer of a database at one of its levels, in turns."""
    database = open_database(folder)
    sparse = database.levels[1:]
    levels = {name: sparse[number % len(sparse)] for number, name in enumerate(database.layers)}
    made_from = {**database.made_from, "database_data_sha256": database.made_from["data_sha256"]}
    return Profile(
        levels, target_speedup=2.0, table_target=2.0, predicted_seconds=1.0, predicted_speedup=2.0, loss=0.0,
        loss_name="none", held_out_loss=None, search="none", evaluations=0, samples_run=0, ended="finished", seed=0,
        errors=None, made_from=made_from,
    )  # fmt: skip


def watched(command: Sequence[str]) -> tuple[float, int, int]:
    """Seconds of a command, and the most bytes of its processes together that were resident and anonymous.

    Time in which everything was stopped isn't counted.

    Raises:
        StepFailed: it ends with an error.
    """
    seconds, before = 0.0, time.perf_counter()
    resident = anonymous = 0
    with tempfile.TemporaryFile() as words, subprocess.Popen(command, stdout=words, stderr=words) as process:
        while process.poll() is None:
            held = [*_memory(process.pid)]
            resident = max(resident, sum(one for one, _ in held))
            anonymous = max(anonymous, sum(own for _, own in held))
            time.sleep(LOOK_SECONDS)
            now = time.perf_counter()
            seconds, before = seconds + min(now - before, STOPPED_SECONDS), now
        if process.returncode:
            words.seek(0)
            raise StepFailed(f"{' '.join(command)}: {words.read().decode(errors='replace').strip()[-400:]}")
    return seconds, resident, anonymous


def _memory(pid: int) -> Iterator[tuple[int, int]]:
    """(resident, anonymous) bytes of a process and of each that it has started."""
    try:
        parent = psutil.Process(pid)
        for one in (parent, *parent.children(recursive=True)):
            status = Path(f"/proc/{one.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            if "VmRSS" in fields:  # a process that has ended and isn't waited for has none
                yield tuple(1024 * int(fields[key].split()[0]) for key in ("VmRSS", "RssAnon"))  # type: ignore[misc]
    except (psutil.Error, OSError):  # it ended meanwhile
        return


def growth(weights: Sequence[int], values: Sequence[float]) -> float:
    """The exponent e of `value = c * weights ** e` that fits best by least squares of the logarithms."""
    return float(np.polyfit(np.log(weights), np.log(values), 1)[0])


def show(rows: Sequence[Row]) -> None:
    """Print the table, and the exponents where there are several sizes."""
    print_table(
        "Memory and time of each step", ("network", "weights", "step", "seconds", "resident", "anonymous"),
        [(row.network, f"{row.weights:,}", row.step, f"{row.seconds:.1f}", f"{row.resident_bytes / 2**30:.2f} GiB",
          f"{row.anonymous_bytes / 2**30:.2f} GiB") for row in rows],
    )  # fmt: skip
    if len({row.network for row in rows}) > 1:
        steps = dict.fromkeys(row.step for row in rows)
        print_table(
            "Growth: exponent of the number of weights", ("step", "seconds", "resident", "anonymous"),
            [_grown([row for row in rows if row.step == step]) for step in steps],
        )  # fmt: skip


def _grown(rows: Sequence[Row]) -> tuple[str, ...]:
    weights = [row.weights for row in rows]
    columns = ([getattr(row, name) for row in rows] for name in ("seconds", "resident_bytes", "anonymous_bytes"))
    return rows[0].step, *(f"{growth(weights, values):.2f}" for values in columns)
