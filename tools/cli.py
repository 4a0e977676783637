"""The command line. Exit codes: 0 done; 1 an expected failure, one line on stderr; 2 wrong usage."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import typer

from onnx_spdy.tools import step_commands as steps
from onnx_spdy.tools.expected import one_line_errors
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
    steps.validate,
    steps.report,
    steps.doctor,
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: expected failures become one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("onnx_spdy.pipeline.search.profile_search").setLevel(logging.INFO)  # which loss was chosen
    with one_line_errors():
        app(arguments)


if __name__ == "__main__":
    main()
