"""`python -m onnx_spdy.tools.bench NAME ...`: one command for all benchmarks. `tools/bench/README.md` explains them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from onnx_spdy.tools.expected import one_line_errors

BENCHMARKS = {
    "cluster": "What Dask workers gain for a layer database, measured and by list scheduling.",
    "database": "What a layer database costs, and how good its layers are on samples that it hasn't seen.",
    "gpu": "What 2:4 gains on a GPU, layer by layer and in whole encoders.",
    "gpu-kernels": "One layer at a time on a GPU: dense and 2:4 in bf16, fp16, fp8 and int8.",
    "gradual": "Which profile ends higher when the network is pruned gradually to it and trained.",
    "groups": "What channels and heads can be removed from networks, and how much work that saves at most.",
    "latency": "How well a latency table predicts networks that it has never seen.",
    "memory": "What the steps take in memory and time for decoders of several sizes.",
    "read-trtexec": "What trtexec said of 2:4, layer by layer.",
    "repair": "What correction and repair give back, with few samples.",
    "scaling": "How searches grow with the number of layers.",
    "search": "What searches find and what they cost.",
    "solve": "How fast the solver is, and how far from the exact optimum.",
    "torch-pruning": "What Torch-Pruning's narrow networks are worth at the same measured speedup.",
}


def command_line(*needed: str) -> typer.Typer:
    """The command with these benchmarks; the others are only listed, because importing them takes seconds."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Benchmarks: what tables, databases, searches, repair and GPUs are worth, and what they cost.",
    )
    app.callback()(lambda: None)  # with it one benchmark alone would still have its name
    for name, summary in BENCHMARKS.items():
        if name in needed:
            function = import_module(f"onnx_spdy.tools.bench.{name.replace('-', '_')}").bench
        else:
            function = _only_listed
        app.command(name, help=summary)(function)
    return app


def _only_listed() -> None:
    """Stands for a benchmark in the list of all."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exit codes as those of `onnx-spdy`."""
    given = sys.argv[1:] if arguments is None else [*arguments]
    with one_line_errors():
        command_line(*given[:1])(given, prog_name="python -m onnx_spdy.tools.bench")


if __name__ == "__main__":
    main()
