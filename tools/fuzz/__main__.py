"""Damaged ONNX files through `onnx-spdy inspect`: each ends in a list of layers or in one line, soon, in little memory.

    python -m onnx_spdy.tools.fuzz --count 2000 --seed 0 [MODEL.onnx ...]

`graphs.py` holds the networks, `damage.py` the damage. A file that makes trouble is kept in --keep, and `inspect` shows
the trouble again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import onnx
import typer

from onnx_spdy.tools.expected import one_line_errors
from onnx_spdy.tools.fuzz.graphs import examples
from onnx_spdy.tools.fuzz.inspect import Outcome, fuzz
from onnx_spdy.tools.options import Seed, out_folder, path
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.table import print_table

ACCEPTED, REFUSED = "accepted", "refused in one line"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL.onnx", parser=path, help="to damage; default: networks of its own"),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="files")] = 2000,
    seed: Seed = 0,
    first: Annotated[int, typer.Option("--first", min=0, help="number of the first file")] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="files at the same time")] = 1,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", parser=out_folder, help="for files that make trouble")
    ] = None,
    json: Json = None,
) -> None:
    """Show what became of damaged files. Exit code 1 where one made trouble."""
    chosen = [onnx.load(model) for model in models] if models else examples()
    found: dict[int, Outcome] = {}
    troubles = []
    for number, one in fuzz(chosen, count, seed, first, workers, keep):
        found[number] = one
        if one.trouble:
            troubles.append({"number": number, "trouble": one.trouble, "text": " ".join(one.text.split())[-300:]})
            print(*troubles[-1].values(), sep=": ", flush=True)
    counts = Counter(one.trouble or (ACCEPTED if one.accepted else REFUSED) for one in found.values())
    slowest, largest = (max(getattr(one, what) for one in found.values()) for what in ("seconds", "memory_bytes"))
    print_table(f"{count} files from {first} on, seed {seed}", ("what became of them", "files"), counts.most_common())
    print(f"slowest {slowest:.1f} s of CPU time, largest {largest / 2**20:.0f} MiB")
    figures = {"counts": counts, "troubles": troubles, "slowest_seconds": slowest, "largest_bytes": largest}
    write_results(json, "fuzz", {"first": first, **figures}, seed)
    raise typer.Exit(bool(troubles))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    with one_line_errors():
        app(arguments, prog_name="python -m onnx_spdy.tools.fuzz")


if __name__ == "__main__":
    main()
