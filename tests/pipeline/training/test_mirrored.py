"""Training on mirrored images: what they are, when they come, and that nobody is asked for their labels."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_spdy.models import Prepared, write_weights
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.training import trainer
from onnx_spdy.pipeline.training.finetune import finetune
from onnx_spdy.pipeline.training.mirrored import WithMirrored, with_mirrored
from tests.models.narrowing import two_blocks


@pytest.fixture
def images() -> Samples:
    rng = np.random.default_rng(3)
    return Samples({"x": rng.normal(size=(48, 3, 16, 16)).astype(np.float32)}, rng.integers(0, 10, 48))


def test_mirror_images_are_behind_the_others_and_have_no_labels(images: Samples) -> None:
    both = with_mirrored(images)
    assert both is not None
    assert len(both) == 96
    plain, mirrored = both.take(np.array([5, 2])), both.take(np.array([53, 50]))
    assert plain.target is not None and images.target is not None
    assert plain.target.tolist() == images.target[[5, 2]].tolist()
    assert mirrored.target is None
    np.testing.assert_array_equal(plain.inputs["x"], images.inputs["x"][[5, 2]])
    np.testing.assert_array_equal(mirrored.inputs["x"], plain.inputs["x"][..., ::-1])


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": np.zeros((4, 1, 49, 10), np.float32)},  # a spectrogram
        {"x": np.zeros((4, 3, 8, 8), np.float32)},  # too small to be an image
        {"x": np.zeros((4, 3, 32, 32), np.int64)},
        {"x": np.zeros((4, 128), np.float32)},
        {"x": np.zeros((4, 3, 32, 32), np.float32), "size": np.zeros((4, 2), np.float32)},
    ],
)
def test_what_is_no_image_is_not_mirrored(inputs: dict[str, np.ndarray]) -> None:
    assert with_mirrored(Samples(inputs)) is None


def test_images_are_mirrored_in_every_other_epoch_after_the_first(
    images: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "MIRRORED_FROM", 2)
    seen: list[bool] = []
    take = WithMirrored.take

    def watched(self: WithMirrored, index: np.ndarray) -> Samples:
        found = take(self, index)
        if len(index) > 6:  # a step of the training
            seen.append(found.target is None)
        return found

    monkeypatch.setattr(WithMirrored, "take", watched)
    dense = Prepared(two_blocks())
    weights = {"w1": np.zeros((16, 16, 3, 3), np.float32)}
    finetune(dense, write_weights(dense.proto, weights), images, epochs=6, batch=42, seed=1)
    assert sum(seen) >= 2  # of epochs 3 and 5, and the dense network's outputs for them
    assert not seen[0]


def test_a_rate_that_makes_nothing_better_for_some_epochs_is_lowered(
    images: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few samples are learned by heart: training goes on from where it was best, more slowly, and ends by itself."""
    monkeypatch.setattr(trainer, "PATIENCE", 1)
    monkeypatch.setattr(trainer, "SMALLEST_RATE", 0.2)
    dense = Prepared(two_blocks())
    weights = {"w1": np.zeros((16, 16, 3, 3), np.float32)}
    found = finetune(dense, write_weights(dense.proto, weights), images, epochs=200, rate=0.5, seed=1).training
    assert found.epochs < 200
    assert "no smaller rate made it better" in found.stopped
    assert found.loss_after < found.loss_before
