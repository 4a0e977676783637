"""The commands of the command line, put together."""

from __future__ import annotations

import typer

from onnx_spdy.tools import step_commands as steps
from onnx_spdy.tools.bench_command import bench
from onnx_spdy.tools.run_command import run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune a trained network to a speedup that is measured in the runtime that will run it.",
)
for command in (
    run,
    steps.inspect,
    steps.prepare,
    steps.measure,
    steps.database,
    steps.search,
    steps.deploy,
    steps.finetune,
    steps.quantise,
    steps.validate,
    steps.report,
    bench,
    steps.doctor,
):
    app.command()(command)
