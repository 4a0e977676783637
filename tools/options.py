"""Arguments and options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from onnx_spdy.pipeline.database.pruners import PRUNERS

T = TypeVar("T")

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="FILE.onnx, or FILE.py:FUNCTION -> (module, example_inputs)")
]
Data = Annotated[str, typer.Option("--data", metavar="DATA", help="calibration samples: FILE.npz or FILE.py:FUNCTION")]
Evaluation = Annotated[str, typer.Option("--eval", metavar="DATA", help="samples for the metric")]
MetricName = Annotated[str, typer.Option("--metric", metavar="M", help="top1 or FILE.py:FUNCTION")]
RuntimeName = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="R",
        help="deepsparse, onnxruntime, openvino[:bf16], cusparselt[:bf16], tensorrt[:bf16], fake; "
        "ssh://HOST/R for one elsewhere",
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="samples a run")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="default: all physical cores")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Pattern = Annotated[str, typer.Option("--pattern", help="unstructured, block4 or N:M; several joined by commas")]
PrunerName = Annotated[str, typer.Option("--pruner", metavar="NAME", help=f"{', '.join(PRUNERS)} or FILE.py:FUNCTION")]
Memory = Annotated[
    float | None, typer.Option("--memory", metavar="GIB", min=0.1, help="of the process while it builds the database")
]
SearchName = Annotated[str, typer.Option("--search", metavar="NAME")]
LossName = Annotated[
    str | None, typer.Option("--loss", metavar="L", help="kl, cross-entropy, squared-error or FILE.py:FUNCTION")
]
SearchSamples = Annotated[int, typer.Option("--search-samples", min=1, help="samples that a profile is scored on")]
AllowBusy = Annotated[
    bool, typer.Option("--allow-busy", help="measure even while other programs use the CPU; the table tells")
]
Finetune = Annotated[
    str, typer.Option("--finetune", metavar="NAME", help="gap: train all pruned layers together, masks fixed; or none")
]
SearchImages = Annotated[
    int | None, typer.Option("--search-images", min=1, help="samples that a search may run through the network")
]
TimeLimit = Annotated[float | None, typer.Option("--time-limit", metavar="MINUTES", help="for the search")]


def gib(value: float | None) -> int | None:
    """GiB as bytes."""
    return None if value is None else int(value * 2**30)


def minutes(value: float | None) -> float | None:
    """Minutes as seconds."""
    return None if value is None else 60 * value


def several(text: str, kind: Callable[[str], T], option: str) -> list[T]:
    """The values that X[,X...] names.

    Raises:
        BadParameter: one of them is no `kind`.
    """
    values = []
    for part in text.split(","):
        try:
            values.append(kind(part.strip()))
        except ValueError as exc:
            raise typer.BadParameter(f"{part!r} is not a number", param_hint=f"'{option}'") from exc
    return values


def speedups(text: str) -> list[float]:
    """The targets that X[,X...] names, ascending.

    Raises:
        BadParameter: one of them is no speedup.
    """
    targets = set(several(text, float, "--speedup"))
    if wrong := [one for one in targets if not (math.isfinite(one) and one >= 1)]:
        raise typer.BadParameter(f"'{wrong[0]:g}' is not a number of at least 1", param_hint="'--speedup'")
    if len({f"{one:g}" for one in targets}) < len(targets):
        raise typer.BadParameter(
            f"{text} names targets that share a folder, they are too close", param_hint="'--speedup'"
        )
    return sorted(targets)
