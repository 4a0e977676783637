"""What TensorRT and trtexec write, read: the lists of sparse layers in a build log, layer profiles, layer information.

The formats are those that NVIDIA documents for TensorRT 10; none of it was read from a run of our own yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from ..base import LayerTime, dense_kernel, one_line
from ..errors import OnnxSpdyError
from ..fused_layers import covered_outputs
from .half_precision import NODE

_ELIGIBLE = re.compile(r"\(Sparsity\) Layers eligible for sparse math:(.*)")
_PICKED = re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)")
_NODE = re.compile(rf"{NODE}\d+")
_VERSION = re.compile(r"\[TensorRT v(\d+)\]")
_DEVICE = {"name": r"Selected Device: (.+)", "capability": r"Compute Capability: (\d+\.\d+)"}
_PROFILE_START = re.compile(r"=== Profile \((\d+) iterations ?\) ===")
_LINE_START = re.compile(r"^\[[^\]]*\] \[[A-Z]\] ")
COPY = "Reformatting CopyNode"  # such a layer bears the name of the layer that it copies for
KERNEL_NAME = 80  # characters


class UnreadableLog(OnnxSpdyError, ValueError):
    """A file or log of TensorRT isn't what its documentation says."""


@dataclass(frozen=True)
class SparsityLists:
    """Layers whose weights are 2:4, and those of them for which TensorRT took a sparse kernel, as it names them."""

    eligible: tuple[str, ...]
    picked: tuple[str, ...]


@dataclass(frozen=True)
class ProfiledLayer:
    """A layer of an engine and its mean seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class EngineLayer:
    """A layer of an engine as its inspector describes it."""

    name: str
    tactic: str  # the kernel, or the kind of layer where that isn't told
    metadata: str  # names the ONNX nodes in it


def sparsity_lists(log: str) -> SparsityLists:
    """The lists that a build with SPARSE_WEIGHTS logs; of several builds, the last one's.

    Raises:
        UnreadableLog: there are none.
    """
    eligible, picked = _ELIGIBLE.findall(log), _PICKED.findall(log)
    if not (eligible and picked):
        raise UnreadableLog("the build log has no (Sparsity) lines; build with SPARSE_WEIGHTS, log level INFO")
    return SparsityLists(_names(eligible[-1]), _names(picked[-1]))


def exported_profile(text: str) -> list[ProfiledLayer]:
    """What `trtexec --exportProfile` wrote.

    Raises:
        UnreadableLog: it is something else.
    """
    try:
        head, *entries = json.loads(text)
        int(head["count"])
        return [ProfiledLayer(str(one["name"]), 1e-3 * float(one["averageMs"])) for one in entries]
    except (ValueError, KeyError, TypeError) as exc:
        raise UnreadableLog(f"not a profile of trtexec --exportProfile ({one_line(repr(exc), 80)})") from exc


def printed_profile(log: str) -> list[ProfiledLayer]:
    """What `trtexec --dumpProfile` printed; older versions have no column for the median.

    Raises:
        UnreadableLog: there is none.
    """
    lines = [_LINE_START.sub("", line).strip() for line in log.splitlines()]
    start = next((number for number, line in enumerate(lines) if _PROFILE_START.match(line)), None)
    columns = re.split(r"\s{2,}", lines[start + 1]) if start is not None and start + 1 < len(lines) else []
    if start is None or columns[:2] != ["Time(ms)", "Avg.(ms)"] or columns[-1] != "Layer":
        raise UnreadableLog("the log has no profile; run trtexec with --dumpProfile")
    found = []
    for line in lines[start + 2 :]:
        cells = line.split(None, len(columns) - 1)
        if len(cells) < len(columns) or cells[-1] == "Total":
            break
        found.append(ProfiledLayer(cells[-1], 1e-3 * float(cells[1])))
    return found


def engine_layers(text: str) -> dict[str, EngineLayer]:
    """The layers of an engine by name: what its inspector or `trtexec --exportLayerInfo` wrote as JSON.

    Raises:
        UnreadableLog: it is something else.
    """
    try:
        layers = json.loads(text)["Layers"]
        described = [one if isinstance(one, dict) else {"Name": str(one)} for one in layers]  # names only: not detailed
        return {
            one["Name"]: EngineLayer(
                one["Name"], one.get("TacticName") or one.get("LayerType", ""), one.get("Metadata", "")
            )
            for one in described
        }
    except (ValueError, KeyError, TypeError) as exc:
        raise UnreadableLog(f"no layer information of TensorRT ({one_line(repr(exc), 80)})") from exc


def exported_times(text: str) -> list[float]:
    """Seconds on the GPU of each run, of what `trtexec --exportTimes` wrote.

    Raises:
        UnreadableLog: it is something else.
    """
    try:
        return [1e-3 * float(one["computeMs"]) for one in json.loads(text)]
    except (ValueError, KeyError, TypeError) as exc:
        raise UnreadableLog(f"no times of trtexec --exportTimes ({one_line(repr(exc), 80)})") from exc


def exported_outputs(text: str, types: Mapping[str, np.dtype]) -> dict[str, np.ndarray]:
    """Outputs by name, of what `trtexec --exportOutput` wrote.

    Raises:
        UnreadableLog: it is something else.
    """
    try:
        return {
            one["name"]: np.array([float(value) for value in one["values"]])
            .reshape([int(size) for size in str(one["dimensions"]).split("x") if size])
            .astype(types[one["name"]])
            for one in json.loads(text)
        }
    except (ValueError, KeyError, TypeError) as exc:
        raise UnreadableLog(f"no outputs of trtexec --exportOutput ({one_line(repr(exc), 80)})") from exc


def logged_version(log: str) -> str:
    """Such as 10.3.0, of trtexec's first line.

    Raises:
        UnreadableLog: there is none.
    """
    if not (found := _VERSION.search(log)):
        raise UnreadableLog("trtexec tells no version of TensorRT")
    digits = int(found[1])
    major, rest = divmod(digits, 10_000 if digits >= 100_000 else 1000)  # 8.6.1 is 8601, 10.3.0 is 100300
    return f"{major}.{rest // 100}.{rest % 100}"


def logged_device(log: str) -> tuple[str, str]:
    """Name and compute capability of the GPU that trtexec ran on.

    Raises:
        UnreadableLog: it tells none.
    """
    found = {name: re.search(pattern, log) for name, pattern in _DEVICE.items()}
    if not (found["name"] and found["capability"]):
        raise UnreadableLog("trtexec tells no device")
    return found["name"][1].strip(), found["capability"][1]


def nodes_in(text: str) -> tuple[str, ...]:
    """Our names of the nodes that a text of TensorRT mentions, each once."""
    return tuple(dict.fromkeys(_NODE.findall(text)))


def layer_rows(
    profile: Sequence[ProfiledLayer],
    layers: Mapping[str, EngineLayer],
    lists: SparsityLists,
    graph: onnx.GraphProto,
    named: Mapping[str, str],
    sparsities: Mapping[str, float],
) -> list[LayerTime]:
    """Rows for the layers of an engine.

    Args:
        profile: its layers' times, in the order in which they run.
        layers: what its inspector says of them.
        lists: of its build.
        graph: what it was built from, its nodes named by `number_nodes`.
        named: tensor of that graph -> tensor of the user's graph.
        sparsities: node name -> fraction of zeros, of each layer whose weights are 2:4.
    """
    made = {node.name: tuple(node.output) for node in graph.node}
    unknown = EngineLayer("", "", "")
    members = [_members(one.name, layers.get(one.name, unknown)) for one in profile]
    taken: set[str] = set()
    anchors: list[tuple[str, ...]] = []
    for nodes in members:
        anchors.append(tuple(name for node in nodes for name in made.get(node, ()) if name not in taken))
        taken.update(anchors[-1])
    eligible, picked = (set(nodes_in(" ".join(names))) for names in (lists.eligible, lists.picked))
    rows = []
    for one, nodes, tensors in zip(profile, members, covered_outputs(graph, anchors), strict=True):
        kernel = one_line(layers.get(one.name, unknown).tactic or one.name, KERNEL_NAME)
        weighted = [node for node in nodes if node in sparsities]
        sparse = any(node in picked for node in weighted)
        if weighted and not sparse:
            reason = "not picked" if any(node in eligible for node in weighted) else "not eligible"
            kernel = dense_kernel(kernel, f"{reason} by TensorRT")
        outputs = tuple(dict.fromkeys(named[name] for name in tensors if name in named))
        sparsity = sparsities[weighted[0]] if len(weighted) == 1 else None
        rows.append(LayerTime(outputs, kernel, one.seconds, sparse, sparsity))
    return rows


def _members(name: str, layer: EngineLayer) -> tuple[str, ...]:
    """The nodes that run in a layer."""
    return () if name.startswith(COPY) else nodes_in(f"{name} {layer.metadata}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(", ") if name.strip())
