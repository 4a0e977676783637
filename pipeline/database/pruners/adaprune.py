"""AdaPrune, as SPDY was published with: magnitude masks, then Adam on the layer's relative squared output error.

Levels come in sequence: the mask of a level keeps the largest weights of the level before, which are also where Adam
starts. It makes as many steps as `PASSES` passes over 1,024 samples in batches of 32. The published form stores
inputs and outputs and takes gradients on batches; here the gradient of the same objective, the mean over all samples,
comes from the Hessian: || (W - W0) X ||^2 / || W0 X ||^2 = tr((W - W0) H (W - W0)^T) / tr(W0 H W0^T). So the steps
differ by the noise of the batches alone.

The learning rate and the batch size that the number of steps follows from are common values, not tuned.

Sources: Hubara et al., Accelerated Sparse Neural Training (NeurIPS 2021); Frantar & Alistarh, SPDY (ICML 2022),
section 4 (passes, levels in sequence).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onnx_spdy.pipeline.database.pruners.quadratic import check_hessian
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.mask import select_mask

PASSES = 10
STEPS_A_PASS = 32  # 1,024 samples in batches of 32
LEARNING_RATE = 1e-3


def adaprune(weight: torch.Tensor, hessian: torch.Tensor, levels: Sequence[Level]) -> Iterator[torch.Tensor]:
    """See `Pruner`. Each level starts from the one before, so the levels' order matters: lowest sparsity first.

    Where a pattern begins that doesn't contain the one before (2:4 after unstructured, for instance), it starts from
    the dense weights.
    """
    check_hessian(hessian)
    dense, curvature = weight.flatten(1).float(), hessian.float()
    power = float(((dense @ curvature) * dense).sum())
    current, pattern = weight.float(), "dense"
    for level in levels:
        if level.pattern != pattern:
            current, pattern = weight.float(), level.pattern
        mask = select_mask(current.abs(), level)
        current = torch.where(mask, current, 0.0)
        if power > 0 and level.pattern != "dense":
            current = _adapt(current.flatten(1), dense, curvature / power, mask.flatten(1)).view(weight.shape)
        yield current.to(weight.dtype).clone()


def _adapt(start: torch.Tensor, dense: torch.Tensor, curvature: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Adam on tr((W - W0) H (W - W0)^T), H (d, d), over the weights that the mask (out, d) keeps."""
    weight = start.clone()
    optimizer = torch.optim.Adam([weight], lr=LEARNING_RATE)
    for _ in range(PASSES * STEPS_A_PASS):
        weight.grad = ((weight - dense) @ curvature).mul_(2).mul_(mask)
        optimizer.step()
    return weight
