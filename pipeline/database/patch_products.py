"""Sums of x x^T over the input patches x of a layer, as few multiplications as its shape allows.

Where a convolution's stride is 1, neighbouring patches are mostly the same numbers. Over *all* positions where a patch
touches the input, the sum for kernel positions a and b depends on b - a alone, C(b - a) = sum_q x[q] x[q + b - a]^T:
for a 3x3 kernel 15 products of channels by channels instead of 81, and they are the gradient of a convolution's
weights, for which nothing is copied. What this counts too much, positions outside the layer's grid because its
padding is less than its kernel, is a thin frame, where few kernel positions meet the input: these patches are unfolded
and subtracted. Exact in the same arithmetic; other layers' patches are all unfolded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch.nn import functional

from onnx_spdy.models import InputPatches
from onnx_spdy.pipeline.database.matmul import fast_float32

PATCH_BYTES = 64 << 20  # of patches in memory at once
LOST = 1e-5  # of an input's sum of squares over all positions: less than this after the subtraction is rounding

Range = tuple[int, int]
Part = tuple[tuple[int, ...], ...]  # kernel positions of each axis whose patches were unfolded; SHIFTS, WHOLE
SHIFTS: Part = ((-1,),)
WHOLE: Part = ()


class PatchProducts:
    """The sum of x x^T in parts that add up over batches, each of its own shape; `matrix` puts them together."""

    def __init__(self, patches: InputPatches) -> None:
        self._patches = patches
        self._kernel = tuple(patches.kernel)

    def __call__(self, x: torch.Tensor) -> Iterator[tuple[Part, torch.Tensor]]:
        """Parts of the sum over the patches of the layer's input x, float32."""
        if x.ndim >= 3 and self._shifts_pay(x):
            yield SHIFTS, self._shifts(x)
            for box in self._frame(x):
                part = self._meeting(x, box)
                if all(part):
                    yield part, gram(self._unfolded(x, box, part))
            return
        each = max(1, 4 * prod(self._kernel) * x[0].numel()) if x.ndim >= 3 else 4 * x.shape[-1]
        for some in x.split(max(1, PATCH_BYTES // each)):
            yield WHOLE, gram(self._patches(some))

    def count(self, x: torch.Tensor) -> int:
        """How many patches x has."""
        if not self._kernel:
            return x.numel() // x.shape[-1]
        return len(x) * prod(end - begin for begin, end in self._grid(x, [0] * len(self._kernel)))

    def matrix(self, parts: Mapping[Part, torch.Tensor]) -> torch.Tensor:
        """(d, d) in the order of `weight.flatten(1)`, from the sum of each part.

        An input that is seen in the frame only, of which the subtraction leaves rounding errors, gets exact zeros.
        """
        channels, positions = self._patches.channels, list(itertools.product(*map(range, self._kernel)))
        size = channels * len(positions)
        found = torch.zeros(len(positions), channels, len(positions), channels, dtype=torch.float64)
        everywhere = torch.zeros(size, dtype=torch.float64)
        for part, total in parts.items():
            if part == SHIFTS:
                for (n, a), (m, b) in itertools.product(enumerate(positions), repeat=2):
                    found[n, :, m] += self._shifted(total, [j - i for i, j in zip(a, b, strict=True)])
                everywhere = found.view(size, size).diagonal().clone()
            elif part == WHOLE:
                found += total.view(found.shape)
            else:
                index = torch.tensor([positions.index(one) for one in itertools.product(*part)])
                block = total.view(len(index), channels, len(index), channels)
                found[index[:, None], :, index] -= block.permute(0, 2, 1, 3)
        never = (found.view(size, size).diagonal() <= LOST * everywhere).view(len(positions), channels)
        found[never] = 0
        found[:, :, never] = 0
        return found.permute(1, 0, 3, 2).reshape(size, size)

    def _shifts_pay(self, x: torch.Tensor) -> bool:
        """Whether shifts and frame take fewer multiplications than the unfolded product.

        A kernel position that meets only padding has exact zeros in the unfolded product, so that is what it gets.
        """
        if prod(self._kernel) == 1 or any(stride != 1 for stride in self._patches.strides):
            return False
        grid = self._grid(x, [span - 1 for span in self._patches.spans])
        if self._meeting(x, grid) != tuple(tuple(range(kernel)) for kernel in self._kernel):
            return False
        shifts = prod(x.shape[2:]) * prod((self._kernel[0], *(2 * k - 1 for k in self._kernel[1:])))
        frame = sum(
            prod(end - begin for begin, end in box) * prod(map(len, self._meeting(x, box))) ** 2
            for box in self._frame(x)
        )
        return shifts + frame < self.count(x[:1]) * prod(self._kernel) ** 2

    def _shifts(self, x: torch.Tensor) -> torch.Tensor:
        """(in, in, *shifts): C at shifts from 0 on the first axis and from 1 - kernel on the others."""
        reach = [span - 1 for span in self._patches.spans]
        padded = functional.pad(x, [pad for n in reach[:0:-1] for pad in (n, n)] + [0, reach[0]])
        rank, channels = len(reach), x.shape[1]
        weight = x.new_empty(channels, channels, self._kernel[0], *(2 * k - 1 for k in self._kernel[1:]))
        dilations = list(self._patches.dilations)
        return torch.ops.aten.convolution_backward(
            x, padded, weight, None, [1] * rank, [0] * rank, dilations, False, [0] * rank, 1, [False, True, False]
        )[1]  # fmt: skip

    def _shifted(self, total: torch.Tensor, shift: list[int]) -> torch.Tensor:
        """(in, in), C at a shift, from what `_shifts` gives; C(-shift) is its transpose."""
        if shift[0] < 0:
            return self._shifted(total, [-one for one in shift]).T
        for place in (shift[0], *(one + k - 1 for one, k in zip(shift[1:], self._kernel[1:], strict=True))):
            total = total.select(2, place)
        return total

    def _grid(self, x: torch.Tensor, reach: list[int]) -> list[Range]:
        """The layer's output positions on each axis, where the input lies `reach` behind the begin."""
        patches, sizes = self._patches, x.shape[2:]
        begins, ends = patches.pads(sizes)
        return [
            (n - begin, n - begin + (size + begin + end - span) // stride + 1)
            for n, size, span, stride, begin, end in zip(
                reach, sizes, patches.spans, patches.strides, begins, ends, strict=True
            )
        ]  # fmt: skip

    def _frame(self, x: torch.Tensor) -> Iterator[list[Range]]:
        """Boxes that together hold all positions where a patch touches the input and that the layer doesn't compute.

        Positions are counted from where the last element of a patch meets the first one of the input.
        """
        reach = [span - 1 for span in self._patches.spans]
        box: list[Range] = [(0, size + n) for size, n in zip(x.shape[2:], reach, strict=True)]
        for axis, (begin, end) in enumerate(self._grid(x, reach)):
            low, high = box[axis]
            begin, end = max(begin, low), min(end, high)
            for one in ((low, begin), (end, high)):
                if one[0] < one[1]:
                    yield [*box[:axis], one, *box[axis + 1 :]]
            box[axis] = (begin, end)

    def _meeting(self, x: torch.Tensor, box: list[Range]) -> Part:
        """The kernel positions of each axis that meet the input somewhere in the box."""
        return tuple(
            tuple(n for n in range(kernel) if begin + n * step < size + span - 1 and end - 1 + n * step >= span - 1)
            for (begin, end), kernel, step, size, span in zip(
                box, self._kernel, self._patches.dilations, x.shape[2:], self._patches.spans, strict=True
            )
        )

    def _unfolded(self, x: torch.Tensor, box: list[Range], part: Part) -> torch.Tensor:
        """(n, positions * in): the patches in the box at the kernel positions of the part."""
        window, pads = [slice(None), slice(None)], list[Range]()
        steps, spans = self._patches.dilations, self._patches.spans
        for (begin, end), at, step, span, size in zip(box, part, steps, spans, x.shape[2:], strict=True):
            first, last = begin + at[0] * step - (span - 1), end + at[-1] * step - (span - 1)  # of the input
            window.append(slice(max(0, first), max(0, min(size, last))))
            pads.append((max(0, -first), max(0, last - size)))
        strip = functional.pad(x[tuple(window)], [pad for pair in pads[::-1] for pad in pair]).movedim(1, -1)
        windows = []
        for at in itertools.product(*part):
            begins = [(n - some[0]) * step for n, some, step in zip(at, part, steps, strict=True)]
            ranges = zip(begins, box, strict=True)
            cut = (slice(None), *(slice(begin, begin + high - low) for begin, (low, high) in ranges))
            windows.append(strip[cut])
        return torch.stack(windows, -2).flatten(0, -3).flatten(1)


@fast_float32()
def gram(matrix: torch.Tensor) -> torch.Tensor:
    """matrix.T @ matrix, (n, d) -> (d, d).

    NumPy's BLAS would see the symmetry and do half the work, but its threads and torch's keep each other waiting when
    they take turns: all in all that was four times slower.
    """
    return matrix.T @ matrix
