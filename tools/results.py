"""What a benchmark leaves: a table on stdout, and where they are asked for a file of all figures and one of a plot."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnx_spdy.pipeline.artifact import read_json, replacing, write_json
from onnx_spdy.runtimes import cpu_model, instruction_set, physical_cores
from onnx_spdy.tools.options import out_file
from onnx_spdy.tools.report.page import svg_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1
PACKAGES = ("onnx-spdy", "torch", "onnxruntime")

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", parser=out_file, help="all figures, as JSON")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg", parser=out_file, help="a picture of them")]


def write_results(path: Path | None, kind: str, content: Mapping[str, Any], seed: int | None = None) -> None:
    """Write all figures of a benchmark, and where they come from. Without a path, do nothing.

    Args:
        kind: as in the file's format, "onnx_spdy.<kind>".
        content: the figures.
        seed: where something was drawn at random.
    """
    if path is not None:
        write_json(path, kind, VERSION, {"environment": environment(seed), **content})


def read_results(path: Path, kind: str) -> dict[str, Any]:
    """What `write_results` wrote.

    Raises:
        ArtifactError: it is missing, damaged, or of another kind.
    """
    return read_json(path, kind, VERSION)


def environment(seed: int | None) -> dict[str, Any]:
    """The machine, the versions and the command, to tell results apart."""
    return {
        "cpu": cpu_model(),
        "instruction_set": instruction_set(),
        "cores": physical_cores(),
        "versions": {name: _version(name) for name in PACKAGES},
        "seed": seed,
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
    }


def write_plot(path: Path | None, draw: Callable[[Figure], None], *, height: float, label: str) -> None:
    """Write what `draw` puts into a figure as an SVG file. Without a path, do nothing."""
    if path is not None:
        text = svg_plot(draw, height=height, label=label, alone=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf8")


def _version(package: str) -> str | None:
    """None where it isn't installed: the GPU benchmark also runs from a bare folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
