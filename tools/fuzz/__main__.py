"""`python -m onnx_spdy.tools.fuzz TRIAL ...`: damaged files and wrong calls, each of which must end in one line.

A trial that makes trouble is printed, and kept in --keep. The same number of the same seed is the same trial.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import onnx
import typer

from onnx_spdy.tools.expected import one_line_errors
from onnx_spdy.tools.fuzz import inspect as inspections
from onnx_spdy.tools.fuzz import kept as kept_files
from onnx_spdy.tools.fuzz import kills as killed_runs
from onnx_spdy.tools.fuzz import mutated, wrong
from onnx_spdy.tools.fuzz import pairs as pairs_of_runs
from onnx_spdy.tools.fuzz.child import Outcome
from onnx_spdy.tools.fuzz.graphs import examples
from onnx_spdy.tools.options import Seed, out_folder, path
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.table import print_table

Count = Annotated[int, typer.Option("--count", min=1, help="trials")]
First = Annotated[int, typer.Option("--first", min=0, help="number of the first one")]
Keep = Annotated[Path | None, typer.Option("--keep", metavar="DIR", parser=out_folder, help="for what makes trouble")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Damaged files, odd networks and wrong calls: exit code 1 where one of them makes trouble.",
)


@app.command()
def inspect(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL.onnx", parser=path, help="to damage; default: networks of its own"),
    ] = None,
    count: Count = 2000,
    seed: Seed = 0,
    first: First = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="files at the same time")] = 1,
    keep: Keep = None,
    json: Json = None,
) -> None:
    """Damaged ONNX files through `inspect`: a list of layers or one line, soon, in little memory."""
    chosen = [onnx.load(model) for model in models] if models else examples()
    _show("inspect", inspections.fuzz(chosen, count, seed, first, workers, keep), seed, first, json)


@app.command()
def run(count: Count = 500, seed: Seed = 0, first: First = 0, keep: Keep = None, json: Json = None) -> None:
    """Damaged networks, and odd but valid ones, through the whole of `run`."""
    _show("run", mutated.trials(count, seed, first, keep), seed, first, json)


@app.command()
def kept(count: Count = 300, seed: Seed = 0, first: First = 0, keep: Keep = None, json: Json = None) -> None:
    """One file of a run damaged, and the run called again: the same results, or one line."""
    _show("kept", kept_files.trials(count, seed, first, keep), seed, first, json)


@app.command()
def kills(count: Count = 40, seed: Seed = 0, first: First = 0, keep: Keep = None, json: Json = None) -> None:
    """A run killed at random moments and called again: the same bits as without."""
    _show("kills", killed_runs.trials(count, seed, first, keep), seed, first, json)


@app.command(name="wrong")
def wrong_calls(count: Count = 250, seed: Seed = 0, first: First = 0, keep: Keep = None, json: Json = None) -> None:
    """Wrong arguments, files and functions of every command: one line, or the usage."""
    _show("wrong", wrong.trials(count, seed, first, keep), seed, first, json)


@app.command()
def pairs(count: Count = 30, seed: Seed = 0, first: First = 0, keep: Keep = None, json: Json = None) -> None:
    """Two runs at once in one folder, with different arguments: never both mixed."""
    _show("pairs", pairs_of_runs.trials(count, seed, first, keep), seed, first, json)


def _show(name: str, outcomes: Iterable[tuple[int, Outcome]], seed: int, first: int, json: Path | None) -> None:
    """Tell troubles as they come, and in the end what became of all."""
    found, troubles = [], []
    with suppress(KeyboardInterrupt):  # then those so far
        for number, one in outcomes:
            found.append(one)
            if one.trouble:
                words = " ".join(one.text.split())[-300:]
                troubles.append({"number": number, "trouble": one.trouble, "what": one.what, "text": words})
                print(*troubles[-1].values(), sep=": ", flush=True)
    counts = Counter(one.trouble or one.became for one in found)
    slowest = max((one.seconds for one in found), default=0.0)
    largest = max((one.memory_bytes for one in found), default=0)
    title = f"{name}: {len(found)} trials from {first} on, seed {seed}"
    print_table(title, ("what became of them", "trials"), counts.most_common())
    print(f"slowest {slowest:.1f} s of CPU time, largest {largest / 2**20:.0f} MiB")
    figures = {"counts": counts, "troubles": troubles, "slowest_seconds": slowest, "largest_bytes": largest}
    write_results(json, f"fuzz_{name}", {"first": first, **figures}, seed)
    raise typer.Exit(bool(troubles))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    with one_line_errors():
        app(arguments, prog_name="python -m onnx_spdy.tools.fuzz")


if __name__ == "__main__":
    main()
