"""Fourier transforms and their windows: the front ends of audio networks. Complex numbers are pairs (last axis 2)."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from onnx_spdy.models.operators.operator import TORCH_DTYPES, Compute, Node


def dft(node: Node) -> Compute:
    inverse, onesided = bool(node.get("inverse", 0)), bool(node.get("onesided", 0))
    default = node.get("axis", 1) if node.opset < 20 else -2

    def run(x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
        along = (default if axis is None else int(axis.item())) % x.dim()
        count = None if length is None else int(length.item())
        values = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)
        if inverse and onesided:
            return torch.fft.irfft(values, count, along).unsqueeze(-1)
        if onesided:
            return torch.view_as_real(torch.fft.rfft(values, count, along))
        return torch.view_as_real((torch.fft.ifft if inverse else torch.fft.fft)(values, count, along))

    return run


def stft(node: Node) -> Compute:
    onesided = bool(node.get("onesided", 1))

    def run(x: Tensor, step: Tensor, window: Tensor | None = None, length: Tensor | None = None) -> Tensor:
        signal = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)
        size = int(length.item()) if length is not None else signal.shape[-1] if window is None else len(window)
        frames = signal.unfold(-1, size, int(step.item()))  # (batch, frames, size)
        frames = frames if window is None else frames * window
        return torch.view_as_real((torch.fft.rfft if onesided else torch.fft.fft)(frames))

    return run


def hann_window(node: Node) -> Compute:
    return _window(node, (0.5, -0.5))


def hamming_window(node: Node) -> Compute:
    return _window(node, (25 / 46, -21 / 46))


def blackman_window(node: Node) -> Compute:
    return _window(node, (0.42, -0.5, 0.08))


def _window(node: Node, coefficients: tuple[float, ...]) -> Compute:
    """A sum of cosines of 0, 1, 2, ... periods."""
    periodic, dtype = node.get("periodic", 1), TORCH_DTYPES[node.get("output_datatype", 1)]

    def run(size: Tensor) -> Tensor:
        count = int(size.item())
        angles = torch.arange(count, dtype=torch.float64) * (2 * pi / (count if periodic else count - 1))
        return sum((c * torch.cos(k * angles) for k, c in enumerate(coefficients)), torch.zeros(count)).to(dtype)

    return run
