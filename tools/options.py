"""Arguments and options that several commands share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from onnx_spdy.pipeline.aim import BEST, SAME
from onnx_spdy.pipeline.database.pruners import PRUNERS
from onnx_spdy.pipeline.training.repair import FULL

T = TypeVar("T")
LARGEST_SEED = 2**63 - 1  # that every generator takes
MOST_THREADS = 1024  # engines hang or crash at absurd numbers; the machine may be another one, so its cores don't tell


def not_empty(text: str) -> str:
    """What was typed.

    Raises:
        BadParameter: nothing, as from a shell variable that isn't set: never a default; or bytes that are no text.
    """
    if not text.strip():
        raise typer.BadParameter("it is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of them
        raise typer.BadParameter(f"{text!r} is no UTF-8; rename it")
    return text


def path(text: str) -> Path:
    """A path to read from; ~ is the home in quotes too.

    Raises:
        BadParameter: it is empty, or there is no such home.
    """
    try:
        return Path(not_empty(text)).expanduser()
    except RuntimeError as exc:
        raise typer.BadParameter(f"{text!r}: {exc}") from exc


def opponent(text: str) -> str:
    """The dense network that a target is against.

    Raises:
        BadParameter: there is no such one.
    """
    if text not in (SAME, BEST):
        raise typer.BadParameter(f"{text!r} is not {SAME} or {BEST}")
    return text


def cluster_address(text: str) -> str:
    """The address of a Dask scheduler.

    Raises:
        BadParameter: it can't be one.
    """
    if not re.fullmatch(r"(tcp|tls|ws|wss)://[^/\s]+:\d{1,5}", text):
        raise typer.BadParameter(f"{text!r} is no address of a Dask scheduler, such as tcp://HOST:8786")
    return text


def out_file(text: str) -> Path:
    """A path to write a file to.

    Raises:
        BadParameter: a file can't be written there. It is better known before the work than after it.
    """
    if (found := path(text)).is_dir():
        raise typer.BadParameter(f"{text!r} is a folder; give the path of a file")
    return _writable(found)


def out_folder(text: str) -> Path:
    """A path to write a folder to.

    Raises:
        BadParameter: there can't be a folder, or nothing can be written in it.
    """
    if (found := path(text)).exists() and not found.is_dir():
        raise typer.BadParameter(f"{text!r} is a file; give the path of a folder")
    return _writable(found / "file").parent


def _writable(file: Path) -> Path:
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir():
        raise typer.BadParameter(f"{str(above)!r} is a file, so there can be nothing below it")
    if not os.access(above, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"nothing can be written in {str(above)!r}")
    return file


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", parser=not_empty, help="FILE.onnx, or FILE.py:FUNCTION -> (module, example_inputs)"
    ),
]
Data = Annotated[
    str,
    typer.Option("--data", metavar="DATA", parser=not_empty, help="calibration samples: FILE.npz or FILE.py:FUNCTION"),
]
ExampleData = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DATA", parser=not_empty, help="samples to try the network on; default: random values"
    ),
]
Evaluation = Annotated[str, typer.Option("--eval", metavar="DATA", parser=not_empty, help="samples for the metric")]
MetricName = Annotated[str, typer.Option("--metric", metavar="M", help="top1 or FILE.py:FUNCTION")]
RUNTIMES_HELP = (
    "deepsparse, sparse, onnxruntime, openvino[:bf16], cusparselt[:bf16], tensorrt[:bf16], fake; ssh://HOST/R for one "
    "elsewhere"
)
RuntimeName = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="R",
        help=RUNTIMES_HELP,
    ),
]
RuntimesOrAuto = Annotated[
    list[str],
    typer.Option(
        "--runtime",
        metavar="R",
        help=f"{RUNTIMES_HELP}; auto for the fastest here that gains by the pattern; several times for a fleet",
    ),
]
OneNetwork = Annotated[
    bool,
    typer.Option(
        "--one-network", help="of a fleet: one that meets the target on every device, instead of one for each"
    ),
]
Against = Annotated[
    str,
    typer.Option(
        "--against",
        metavar="same|best",
        parser=opponent,
        help="the dense network that the target is against: in the same runtime, or the best dense alternative here",
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="samples a run")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, max=MOST_THREADS, help="default: all physical cores")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED)]
Pattern = Annotated[
    str,
    typer.Option(
        "--pattern",
        help=(
            "zeros: unstructured, blockout2, blockout4, blockout8, block4, N:M (several joined by commas); widths: "
            "channels, or channels+int8 in int8; int8: each layer's precision"
        ),
    ),
]
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
    str,
    typer.Option(
        "--finetune",
        metavar="NAME",
        help="gap: train all pruned layers together, masks fixed; full: gap, then the whole network; or none",
    ),
]
TrainData = Annotated[
    str | None,
    typer.Option(
        "--train",
        metavar="DATA",
        parser=not_empty,
        help="samples for --finetune full; default: --data",
    ),
]
FinetuneLimit = Annotated[
    float, typer.Option("--finetune-limit", metavar="MINUTES", help="of training the whole network")
]
SearchImages = Annotated[
    int | None, typer.Option("--search-images", min=1, help="samples that a search may run through the network")
]
ClusterAddress = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="tcp://HOST:PORT",
        parser=cluster_address,
        help="a Dask scheduler, whose workers build the database and score profiles",
    ),
]
TimeLimit = Annotated[float | None, typer.Option("--time-limit", metavar="MINUTES", help="for the search")]


def gib(value: float | None) -> int | None:
    """GiB as bytes.

    Raises:
        BadParameter: infinite or not a number.
    """
    if value is None:
        return None
    if not math.isfinite(value * 2**30):
        raise typer.BadParameter(f"{value:g} is not an amount of memory", param_hint="'--memory'")
    return int(value * 2**30)


def minutes(value: float | None, option: str = "--time-limit") -> float | None:
    """Minutes as seconds.

    Raises:
        BadParameter: not a positive number; the message names the option.
    """
    if value is None:
        return None
    if not (math.isfinite(60 * value) and value > 0):
        raise typer.BadParameter(f"{value:g} is not a positive number of minutes", param_hint=f"'{option}'")
    return 60 * value


def training_seconds(finetune: str, train: str | None, limit: float) -> float:
    """How long the whole network may be trained.

    Args:
        finetune, train, limit: --finetune, --train and --finetune-limit.
    Raises:
        BadParameter: the limit is no positive number; or there are samples to train on, and nothing is.
    """
    if train and finetune != FULL:
        raise typer.BadParameter(f"is for --finetune {FULL}, and this is {finetune}", param_hint="'--train'")
    seconds = minutes(limit, "--finetune-limit")
    assert seconds is not None
    return seconds


def several(text: str, kind: Callable[[str], T], option: str, what: str = "a number") -> list[T]:
    """The values that X[,X...] names.

    Args:
        kind: makes a value of its text, or raises ValueError.
        option: for the message.
        what: a value is, for the message.
    Raises:
        BadParameter: one of them is no `kind`.
    """
    values = []
    for part in text.split(","):
        try:
            values.append(kind(part.strip()))
        except ValueError as exc:
            raise typer.BadParameter(f"{part!r} is not {what}", param_hint=f"'{option}'") from exc
    return values


def speedups(text: str) -> list[float]:
    """The targets that X[,X...] names, ascending.

    Raises:
        BadParameter: one of them is no speedup.
    """
    targets = set(several(text, _speedup, "--speedup", "a number of at least 1"))
    if len({f"{one:g}" for one in targets}) < len(targets):
        raise typer.BadParameter(
            f"{text} names targets that share a folder, they are too close", param_hint="'--speedup'"
        )
    return sorted(targets)


def _speedup(text: str) -> float:
    if not (math.isfinite(number := float(text)) and number >= 1):
        raise ValueError(text)
    return number
