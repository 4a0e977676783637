"""The file beside a result that loads and runs it as it was measured, with the engine alone."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from onnx_spdy.runtimes import Runtime, Workload, resolved
from onnx_spdy.runtimes.atomic import replacing

FILE = "load.py"


def write_usage(folder: Path, graph: onnx.GraphProto, runtime: Runtime, workload: Workload, model: Path) -> None:
    """Write FILE into a folder; nothing where the engine has no Python of its own.

    Args:
        graph: of the network, whose inputs are filled with ones.
        model: its file, in this folder or one around it.
    """
    if not runtime.usage:
        return
    inputs = ",\n".join(
        f'    {name!r}: np.ones({array.shape}, "{array.dtype}")'
        for name, array in (resolved(graph, workload).inputs or {}).items()
    )
    text = f"""\
# Runs {model.name} in {runtime.name}, for which it was made. It needs that engine and NumPy, nothing else.
from pathlib import Path
import numpy as np
MODEL = str(Path(__file__).parent / {os.path.relpath(model, folder)!r})
INPUTS = {{  # put your own here
{inputs},
}}
{runtime.usage}print(*(array.shape for array in result))
"""
    with replacing(folder / FILE) as file:
        file.write_text(text, encoding="utf-8")
