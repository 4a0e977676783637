"""What trtexec said of 2:4, layer by layer: eligible or not, picked or not, and its time dense and sparse.

    trtexec --onnx=dense.onnx --dumpProfile > dense.log
    trtexec --onnx=model.onnx --sparsity=enable --dumpProfile > sparse.log
    python -m onnx_spdy.tools.bench read-trtexec sparse.log --dense dense.log

A profile may also be a file of --exportProfile. Layers of two builds are the same where they have the same name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from onnx_spdy.runtimes.nvidia.trt_log import ProfiledLayer, exported_profile, printed_profile, sparsity_lists
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.table import print_table


@dataclass(frozen=True)
class LayerSparsity:
    """A layer of an engine that was built with SPARSE_WEIGHTS.

    Attributes:
        eligible: its weights are 2:4.
        picked: TensorRT took a sparse kernel for it.
        dense_seconds, sparse_seconds: in the two builds; None where that has no layer of this name.
    """

    name: str
    eligible: bool
    picked: bool
    dense_seconds: float | None
    sparse_seconds: float | None

    @property
    def why_not(self) -> str:
        """Why 2:4 gains nothing here; empty where it does, or where nothing is known."""
        if not self.eligible:
            return "not eligible"
        if not self.picked:
            return "not picked"
        if self.dense_seconds is None or self.sparse_seconds is None:
            return ""
        return "slower" if self.sparse_seconds >= self.dense_seconds else ""


def layer_sparsities(log: str, sparse: list[ProfiledLayer], dense: list[ProfiledLayer]) -> list[LayerSparsity]:
    """The layers of the sparse build, in the order in which they run, then eligible ones that have no time.

    Args:
        log: of a build with SPARSE_WEIGHTS.
        sparse, dense: profiles of that build, and of one of the dense network; either may be empty.
    """
    lists = sparsity_lists(log)
    seconds = [{layer.name: layer.seconds for layer in layers} for layers in (dense, sparse)]
    names = dict.fromkeys([*(layer.name for layer in sparse), *lists.eligible])
    return [
        LayerSparsity(name, name in lists.eligible, name in lists.picked, *(one.get(name) for one in seconds))
        for name in names
    ]


def read_profile(path: Path) -> list[ProfiledLayer]:
    """The profile in a log, or in a file of --exportProfile.

    Raises:
        UnreadableLog: there is none.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    return exported_profile(text) if path.suffix == ".json" else printed_profile(text)


def bench(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="of a build with --sparsity=enable")],
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="FILE", help="its --exportProfile; default: what it printed")
    ] = None,
    dense: Annotated[
        Path | None, typer.Option("--dense", metavar="FILE", help="log or exported profile of the dense network")
    ] = None,
    json: Json = None,
) -> None:
    """Show a line for each layer."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = layer_sparsities(text, read_profile(profile or log), read_profile(dense) if dense else [])
    print_table(
        "Layers", ("layer", "eligible", "picked", "dense ms", "sparse ms", "why not"),
        [(one.name, *("yes" if flag else "no" for flag in (one.eligible, one.picked)),
          *("-" if seconds is None else f"{1e3 * seconds:.4f}" for seconds in (one.dense_seconds, one.sparse_seconds)),
          one.why_not) for one in found],
    )  # fmt: skip
    print(f"{sum(one.picked for one in found)} of {sum(one.eligible for one in found)} eligible layers were picked")
    write_results(json, "bench_read_trtexec", {"layers": [asdict(one) for one in found]})
