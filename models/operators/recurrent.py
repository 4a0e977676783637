"""Recurrent layers: RNN, GRU and LSTM, forwards, backwards or both, as PyTorch and TensorFlow export them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node, trimmed

Cell = Callable[..., tuple[Tensor, ...]]  # (inputs of the gates, states, one direction's weights) -> new states

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "Relu": lambda x, alpha, beta: torch.relu(x),
    "Tanh": lambda x, alpha, beta: torch.tanh(x),
    "Sigmoid": lambda x, alpha, beta: torch.sigmoid(x),
    "Affine": lambda x, alpha, beta: alpha * x + beta,
    "LeakyRelu": lambda x, alpha, beta: F.leaky_relu(x, alpha),
    "ThresholdedRelu": lambda x, alpha, beta: torch.where(x > alpha, x, torch.zeros_like(x)),
    "ScaledTanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "HardSigmoid": lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1),
    "Elu": lambda x, alpha, beta: F.elu(x, alpha),
    "Softsign": lambda x, alpha, beta: F.softsign(x),
    "Softplus": lambda x, alpha, beta: F.softplus(x),
}
ALPHAS = {"LeakyRelu": 0.01, "ThresholdedRelu": 1.0, "HardSigmoid": 0.2, "Elu": 1.0, "Affine": 1.0, "ScaledTanh": 1.0}
BETAS = {"HardSigmoid": 0.5, "Affine": 0.0, "ScaledTanh": 1.0}


def rnn(node: Node) -> Compute:
    return _Recurrent(node, gates=1, defaults=("Tanh",))


def gru(node: Node) -> Compute:
    return _Recurrent(node, gates=3, defaults=("Sigmoid", "Tanh"))


def lstm(node: Node) -> Compute:
    if node.get("input_forget", 0):
        raise node.unsupported("input_forget=1 (coupled gates)")
    return _Recurrent(node, gates=4, defaults=("Sigmoid", "Tanh", "Tanh"))


class _Recurrent:
    """One node: x (time, batch, in), or (batch, time, in) with layout=1 -> all outputs and the last states."""

    def __init__(self, node: Node, gates: int, defaults: tuple[str, ...]) -> None:
        self.node, self.gates = node, gates
        direction = node.get("direction", "forward")
        self.backwards = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
        self.batch_first = bool(node.get("layout", 0))
        self.reset_first = not node.get("linear_before_reset", 0)
        self.limit: float | None = node.get("clip")
        names = [name.decode() if isinstance(name, bytes) else name for name in node.get("activations", ())]
        self.functions = self._functions(names or list(defaults) * len(self.backwards), len(defaults))

    def _functions(self, names: list[str], count: int) -> list[list[Callable[..., Tensor]]]:
        if unknown := [name for name in names if name not in FUNCTIONS]:
            raise self.node.unsupported(f"activation '{unknown[0]}'")
        # Lists hold a number for each function that takes one, in order.
        alphas, betas = iter(self.node.get("activation_alpha", ())), iter(self.node.get("activation_beta", ()))
        found = []
        for name in names:
            alpha = next(alphas, ALPHAS[name]) if name in ALPHAS else 0.0
            beta = next(betas, BETAS[name]) if name in BETAS else 0.0
            found.append(lambda x, f=FUNCTIONS[name], a=alpha, b=beta: f(x, a, b))
        return [found[i : i + count] for i in range(0, len(found), count)]

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        recurrence: Tensor,
        bias: Tensor | None = None,
        lengths: Tensor | None = None,
        state: Tensor | None = None,
        cell: Tensor | None = None,
        peepholes: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        if self.batch_first:
            x = x.transpose(0, 1)
            state, cell = (None if s is None else s.transpose(0, 1) for s in (state, cell))
        hidden = recurrence.shape[2]
        outputs, lasts = [], []
        for d, backwards in enumerate(self.backwards):
            zeros = x.new_zeros(x.shape[1], hidden)
            states = [zeros if state is None else state[d]]
            if self.gates == 4:
                states.append(zeros if cell is None else cell[d])
            biases = x.new_zeros(2 * self.gates * hidden) if bias is None else bias[d]
            gated = F.linear(x, weight[d], biases[: self.gates * hidden])  # (time, batch, gates * hidden)
            part = None if peepholes is None else peepholes[d].chunk(3)
            step = self._step(self.functions[d], recurrence[d], biases[self.gates * hidden :], part)
            sequence, last = _scan(gated, states, step, lengths, backwards)
            outputs.append(sequence)
            lasts.append(last)
        y = torch.stack(outputs, 1)  # (time, directions, batch, hidden)
        finals = [torch.stack(parts) for parts in zip(*lasts, strict=True)]  # (directions, batch, hidden) each
        if self.batch_first:
            y, finals = y.permute(2, 0, 1, 3), [final.transpose(0, 1) for final in finals]
        return trimmed(self.node, (y, *finals))

    def _step(self, functions, recurrence: Tensor, bias: Tensor, peepholes) -> Cell:
        limit = self.limit

        def clip(v: Tensor) -> Tensor:
            return v if limit is None else v.clamp(-limit, limit)

        def simple(gated: Tensor, h: Tensor) -> tuple[Tensor, ...]:
            return (functions[0](clip(gated + F.linear(h, recurrence, bias))),)

        def gru(gated: Tensor, h: Tensor) -> tuple[Tensor, ...]:
            f, g = functions
            size = h.shape[1]
            both = F.linear(h, recurrence[: 2 * size], bias[: 2 * size])
            update, reset = f(clip(gated[:, : 2 * size] + both)).chunk(2, 1)
            inner, inner_bias = recurrence[2 * size :], bias[2 * size :]
            new = F.linear(reset * h, inner, inner_bias) if self.reset_first else reset * F.linear(h, inner, inner_bias)
            return ((1 - update) * g(clip(gated[:, 2 * size :] + new)) + update * h,)

        def lstm(gated: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            f, g, last = functions
            i, o, forget, new = (gated + F.linear(h, recurrence, bias)).chunk(4, 1)
            if peepholes is not None:
                i, forget = i + peepholes[0] * c, forget + peepholes[2] * c
            c = f(clip(forget)) * c + f(clip(i)) * g(clip(new))
            if peepholes is not None:
                o = o + peepholes[1] * c
            return f(clip(o)) * last(c), c

        cells: dict[int, Cell] = {1: simple, 3: gru, 4: lstm}
        return cells[self.gates]


def _scan(
    gated: Tensor, states: list[Tensor], step: Cell, lengths: Tensor | None, backwards: bool
) -> tuple[Tensor, list[Tensor]]:
    """All outputs in their place in time, and the states after the last step of each sample."""
    steps = len(gated)
    results: list[Tensor] = [states[0]] * steps
    for t in reversed(range(steps)) if backwards else range(steps):
        new = step(gated[t], *states)
        if lengths is None:
            results[t], states = new[0], list(new)
        else:  # a sample that is over keeps its states and gives zeros
            alive = (t < lengths)[:, None]
            states = [torch.where(alive, after, before) for after, before in zip(new, states, strict=True)]
            results[t] = torch.where(alive, new[0], torch.zeros_like(new[0]))
    return torch.stack(results) if steps else gated.new_zeros(0, *states[0].shape), states
