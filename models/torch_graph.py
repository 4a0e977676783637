"""Run an ONNX graph in PyTorch, with its weights as parameters and its nodes as modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from onnx_spdy.models.graph import ModelError, UnsupportedOperator, graph_inputs, opset_of
from onnx_spdy.models.operators import OPERATORS, Node
from onnx_spdy.models.operators.operator import Compute
from onnx_spdy.models.placement import Placement, place
from onnx_spdy.models.read_graph import read_nodes, read_tensors


class NodeModule(nn.Module):
    """One ONNX node: input tensors in the order of the node's inputs -> its output, a tuple when it has several.

    It holds no weights (they are inputs), so a forward hook sees exactly what the node computes on.
    """

    def __init__(self, node: Node, compute: Compute) -> None:
        super().__init__()
        self.node = node
        self._compute = compute

    def forward(self, *inputs: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        return self._compute(*inputs)

    def extra_repr(self) -> str:
        return f"{self.node.op} '{self.node.name}'"


@dataclass(frozen=True)
class _Step:
    """One node's work on the list of values; numbers are positions in that list (0 holds None)."""

    module: NodeModule
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    last_uses: tuple[int, ...]
    moves: tuple[int, ...]  # which of the inputs go from the CPU to the network's device


@dataclass(frozen=True)
class Suspended:
    """A run that stopped before a node, with what is still needed to go on.

    Attributes:
        step: number of the node that comes next.
        values: position -> computed tensor, or tuple of them; weights aren't among them.
    """

    step: int
    values: Mapping[int, Any]

    @property
    def bytes(self) -> int:
        """Memory that the tensors take."""
        lists = (value if isinstance(value, tuple) else (value,) for value in self.values.values())
        return sum(value.numel() * value.element_size() for values in lists for value in values)


class TorchGraph(nn.Module):
    """An ONNX graph as a module: `forward({input name: tensor}) -> {output name: tensor}`.

    Each floating initializer that the network computes with is a parameter, named exactly like the initializer in
    `named_parameters()` and `state_dict()`. Running statistics and integer tensors are buffers; shapes, axes and
    bounds are constants on the CPU. The model is copied: changes here don't reach it (see `write_weights`). Weights
    that it maps are mapped here too, and only what is changed takes memory that the system can't take back.

    Raises:
        UnsupportedOperator: the message names all operators that are missing, not just the first.

    Example:
        graph = TorchGraph(load_model("model.onnx"))
        graph.node("conv1").register_forward_pre_hook(lambda module, inputs: ...)  # (x, weight, bias)
        logits = graph({"input": images})["logits"]
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        read = _read(model)
        nodes, stored = [node for node, _ in read], read_tensors(model.graph)
        placement = place(nodes, stored)
        self.input_names = tuple(value.name for value in graph_inputs(model))
        self.output_names = tuple(value.name for value in model.graph.output)
        modules = [NodeModule(node, compute) for node, compute in read]
        self._nodes = nn.ModuleList(modules)
        self._node_index = {node.name: i for i, node in enumerate(nodes)}
        own_names = {tensor.name for tensor in model.graph.initializer}
        self._add_tensors(_used_on_device(nodes, stored, placement, self.output_names), stored, own_names)
        self._lay_out(nodes, stored, placement, modules)

    def node(self, name: str) -> NodeModule:
        """The module of the node with this name (as `node_names` gives it); Constant nodes have none."""
        if name not in self._node_index:
            raise ModelError(f"the graph has no node '{name}' that computes something")
        module = self._nodes[self._node_index[name]]
        assert isinstance(module, NodeModule)
        return module

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises ModelError when a graph input is missing or a name is no graph input."""
        return self.run(inputs)

    def run(
        self,
        inputs: Mapping[str, Tensor],
        start: Suspended | None = None,
        keep: Callable[[Suspended], None] | None = None,
        keep_before: Collection[int] = (),
    ) -> dict[str, Tensor]:
        """Like `forward`, but goes on from a suspended run, or hands out suspended runs on the way.

        Args:
            inputs: the same as those of the run that was suspended.
            start: where to go on; weights of the nodes before it are not looked at again.
            keep: called with the run as it is before each of the nodes numbered in `keep_before`.
        """
        values, device = self._begin(inputs, start), self._device(inputs)
        for number in range(start.step if start else 0, len(self._steps)):
            if keep is not None and number in keep_before:
                keep(self._suspended(number, values))
            step = self._steps[number]
            self._store(step, values, self._compute(step, values, device))
        return self._results(values)

    def advance(self, inputs: Mapping[str, Tensor], start: Suspended | None, stop: int) -> Suspended:
        """Like `run`, but only up to the node numbered `stop`, which isn't run any more."""
        values, device = self._begin(inputs, start), self._device(inputs)
        for step in self._steps[start.step if start else 0 : stop]:
            self._store(step, values, self._compute(step, values, device))
        return self._suspended(stop, values)

    def run_together(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        after: Callable[[NodeModule, list[Tensor]], list[Tensor]],
    ) -> list[dict[str, Tensor]]:
        """Run several batches node by node: each node on all of them before the next node.

        For graphs that fix their batch size, where something has to be known of a node's outputs for many samples
        before the next node runs. It takes as much memory as one large batch.

        Args:
            batches: inputs, as `forward` takes them.
            after: called with each node that has one output and its outputs for all batches; what it returns takes
                their place. It may change parameters.
        """
        runs = [self._begin(inputs) for inputs in batches]
        device = self._device(batches[0])
        for step in self._steps:
            results = [self._compute(step, values, device) for values in runs]
            if len(step.outputs) == 1:
                results = after(step.module, results)
            for values, result in zip(runs, results, strict=True):
                self._store(step, values, result)
        return [self._results(values) for values in runs]

    def _begin(self, inputs: Mapping[str, Tensor], start: Suspended | None = None) -> list[Tensor | None]:
        """The list of values before the first node runs, or the one with which a suspended run goes on."""
        if len(inputs) != len(self.input_names) or any(name not in inputs for name in self.input_names):
            raise ModelError(f"the graph's inputs are {list(self.input_names)}, but {list(inputs)} were given")
        values: list[Tensor | None] = [None] * self._value_count
        for name, position in self._constants:
            values[position] = self._host_tensors[name]
        for name, position in self._parameter_positions:
            values[position] = self._parameters[name]
        for name, position in self._buffer_positions:
            values[position] = self._buffers[name]
        for name, position in self._input_positions:
            values[position] = inputs[name]
        for position, tensor in start.values.items() if start else ():
            values[position] = tensor
        return values

    def _suspended(self, number: int, values: list[Tensor | None]) -> Suspended:
        return Suspended(number, {position: values[position] for position in self._live_before(number)})

    def _compute(self, step: _Step, values: list[Tensor | None], device: torch.device | None) -> Any:
        arguments = [values[position] for position in step.inputs]
        if device is not None:
            for k in step.moves:
                if isinstance(moved := arguments[k], Tensor):  # a list of tensors stays where it was made
                    arguments[k] = moved.to(device)
        return step.module(*arguments)

    def _store(self, step: _Step, values: list[Tensor | None], result: Any) -> None:
        if len(step.outputs) == 1:
            values[step.outputs[0]] = result
        else:
            for position, tensor in zip(step.outputs, result, strict=True):
                values[position] = tensor
        for position in step.last_uses:
            values[position] = None

    def _results(self, values: list[Tensor | None]) -> dict[str, Tensor]:
        return {name: values[position] for name, position in self._output_positions}  # type: ignore[misc]

    def step_of(self, name: str) -> int:
        """The number of a node in the order in which they run."""
        return self._node_index[name]

    def _live_before(self, number: int) -> list[int]:
        """Positions of tensors that nodes before this one made and that it or later ones, or the caller, need."""
        made = {position for step in self._steps[:number] for position in step.outputs}
        needed = {position for step in self._steps[number:] for position in step.inputs}
        return sorted(made & (needed | {position for _, position in self._output_positions}))

    def _device(self, inputs: Mapping[str, Tensor]) -> torch.device | None:
        """Where the network is, or None when nothing has to be moved there."""
        if not self._any_moves:
            return None
        tensors = (x for x in (*self._parameters.values(), *inputs.values()) if isinstance(x, Tensor))
        device = next((tensor.device for tensor in tensors), None)
        return None if device is None or device.type == "cpu" else device

    def _add_tensors(self, kinds: Mapping[str, bool], stored: Mapping[str, Tensor], own_names: set[str]) -> None:
        for name, trainable in kinds.items():
            # Straight into the dicts: register_parameter() and setattr refuse names with dots, which every name in
            # a PyTorch export has. Nothing else in nn.Module minds them.
            if trainable and name in own_names:
                self._parameters[name] = nn.Parameter(stored[name])
            else:
                self._buffers[name] = stored[name]
                if name not in own_names:  # the value of a Constant node
                    self._non_persistent_buffers_set.add(name)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        # nn.Module takes the part of a name before its first dot for a submodule, and would call it unknown.
        own = {f"{prefix}{name}" for name in (*self._parameters, *self._buffers)}
        unexpected[:] = [name for name in unexpected if name not in own]

    def _lay_out(
        self, nodes: list[Node], stored: Mapping[str, Tensor], placement: Placement, modules: list[NodeModule]
    ) -> None:
        """Give every value a position in a list, once, so that a run needs no names."""
        positions: dict[tuple[str, bool], int] = {("", False): 0}

        def position_of(name: str, host: bool = False) -> int:
            # A stored tensor may be needed twice: by shape arithmetic on the CPU, and on the device.
            key = (name, host and name in stored)
            return positions.setdefault(key, len(positions)) if name else 0

        inputs = [
            tuple(position_of(name, (i, k) in placement.host_inputs) for k, name in enumerate(node.inputs))
            for i, node in enumerate(nodes)
        ]
        outputs = [tuple(position_of(name) for name in node.outputs) for node in nodes]
        self._output_positions = [(name, position_of(name)) for name in self.output_names]
        last_uses = _last_uses(inputs, outputs, {position for _, position in self._output_positions})
        self._steps = [
            _Step(
                modules[i],
                inputs[i],
                outputs[i],
                last_uses[i],
                tuple(k for k in range(len(inputs[i])) if (i, k) in placement.moves),
            )
            for i in range(len(nodes))
        ]
        self._input_positions = [(name, position_of(name)) for name in self.input_names]
        self._parameter_positions = [(name, positions[name, False]) for name in self._parameters]
        self._buffer_positions = [(name, positions[name, False]) for name in self._buffers]
        self._constants = [(name, position) for (name, host), position in positions.items() if host]
        self._host_tensors = {name: stored[name].clone() for name, _ in self._constants}
        self._any_moves = bool(placement.moves)
        self._value_count = len(positions)


def _read(model: onnx.ModelProto) -> list[tuple[Node, Compute]]:
    try:
        return read_nodes(model.graph, opset_of(model))
    except UnsupportedOperator as exc:
        raise UnsupportedOperator(f"TorchGraph can't run this graph: {exc}") from exc


def _used_on_device(
    nodes: list[Node], stored: Mapping[str, Tensor], placement: Placement, outputs: tuple[str, ...]
) -> dict[str, bool]:
    """Stored tensors that have to follow the network to its device -> whether they can be trained."""
    kinds: dict[str, bool] = {}
    for i, node in enumerate(nodes):
        for k, name in enumerate(node.inputs):
            if name in stored and (i, k) not in placement.host_inputs:
                statistic = k in OPERATORS[node.op].statistics
                kinds[name] = kinds.get(name, True) and stored[name].is_floating_point() and not statistic
    for name in outputs:
        if name in stored:
            kinds.setdefault(name, False)
    return kinds


def _last_uses(inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], kept: set[int]) -> list[tuple[int, ...]]:
    """For each step the values that nobody needs after it."""
    seen = kept | {0}
    freed: list[tuple[int, ...]] = []
    for before, after in zip(reversed(inputs), reversed(outputs), strict=True):
        freed.append(tuple(dict.fromkeys(position for position in (*before, *after) if position not in seen)))
        seen.update(before, after)
    return freed[::-1]
