"""The default loss sees every error that matters, whatever the outputs are."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.loss import (
    KL,
    LOSSES,
    PER_CHANNEL,
    LossError,
    cross_entropy,
    distillation_loss,
    fit_loss,
    kl_divergence,
    loss_name,
    numbers,
)
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.objective import Objective
from onnx_spdy.pipeline.rows import sample_axes


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits(samples: int = 200, classes: int = 10, scale: float = 3.0) -> torch.Tensor:
    """Of a trained classifier: around zero, and one class stands out in each row."""
    chosen = torch.arange(samples) % classes
    values = scale * (noise(samples, classes) * 0.5 + 3 * torch.nn.functional.one_hot(chosen, classes))
    return values - values.mean(1, keepdim=True)


def landmarks(samples: int = 200, spread: float = 6.0) -> torch.Tensor:
    """Five points in pixels of a 112 x 112 face, all moving a little and a bit together."""
    middle = torch.tensor([38.0, 52, 73, 52, 56, 72, 42, 92, 71, 92])
    return middle + spread * noise(samples, 10) + spread * noise(samples, 1, seed=1)


CLASSES = {
    "logits": logits(),
    "sharp logits": logits(scale=60.0),
    "weak logits": logits(scale=0.1),
    "two classes": logits(classes=2),
    "probabilities": logits().softmax(1),
    "sharp probabilities": logits(scale=60.0).softmax(1),
    "log-probabilities": logits().log_softmax(1),
    "masked logits": torch.where(noise(200, 10, seed=3) > 1, -torch.inf, logits()),
    "logits masked by a number": torch.where(noise(200, 10, seed=3) > 1, -1e8, logits()),
    "of three classes only": logits(30, 3).repeat(1, 5)[:, :10] + logits(30, 10) * 0.1,
}
NO_CLASSES = {
    "landmarks": landmarks(),
    "landmarks that wander": landmarks(spread=25.0),
    "boxes": torch.tensor([100.0, 80, 400, 300]) + 60 * noise(200, 4) + 100 * noise(200, 1, seed=2),
    "centred pixels": landmarks() - 64,
    "one certain class": torch.eye(10)[torch.zeros(50, dtype=torch.long)],
    "sigmoids": logits().sigmoid(),
    "sigmoids' logits": logits() - 12,
    "embeddings": torch.nn.functional.normalize(noise(50, 16)),
    "one logit": noise(50, 1),
    "counts": torch.poisson(20 + 5 * noise(100, 6).abs()),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_classifier_is_compared_by_its_distributions(name: str) -> None:
    assert fit_loss(None, [{"output": CLASSES[name]}]).name == KL


@pytest.mark.parametrize("name", NO_CLASSES)
def test_anything_else_is_compared_channel_by_channel(name: str) -> None:
    found = fit_loss(None, [{"output": NO_CLASSES[name]}])
    assert found.name == PER_CHANNEL
    assert "--loss changes it" in str(found)


def test_targets_that_are_not_whole_are_no_classes_and_labels_beside_scores_do_not_count() -> None:
    assert fit_loss(None, [{"output": logits()}], noise(200)).name == PER_CHANNEL
    assert fit_loss(None, [{"output": logits()}], torch.arange(200.0)).name == KL
    assert fit_loss(None, [{"label": torch.arange(200), "output": logits().softmax(1)}]).name == KL


def test_every_error_as_large_as_the_variance_counts_as_one() -> None:
    for values in NO_CLASSES.values():
        if values.std(0).min() > 0:
            shifted = values + values.std(0, correction=0)
            assert float(fit_loss(None, [{"o": values}])({"o": shifted}, {"o": values})) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("axis", [1, 2])
def test_scores_count_as_much_as_pixels_on_either_axis(axis: int) -> None:
    boxes, scores = 320 + 150 * noise(64, 4, 100), noise(64, 8, 100, seed=1).sigmoid() ** 3
    dense = torch.cat([boxes, scores], 1).movedim(1, axis)
    loss = fit_loss(None, [{"o": part} for part in dense.split(16)])
    no_scores = torch.cat([boxes, torch.zeros_like(scores)], 1).movedim(1, axis)
    no_boxes = torch.cat([torch.zeros_like(boxes), scores], 1).movedim(1, axis)
    lost = [float(loss({"o": one}, {"o": dense})) for one in (no_scores, no_boxes)]
    assert lost[0] > 8 / 12
    variances = torch.stack([v.var(correction=0) for v in torch.cat([boxes, scores], 1).unbind(1)])
    expected = (torch.cat([torch.zeros_like(boxes), scores], 1).square().mean((0, 2)) / variances).mean()
    assert lost[0] == pytest.approx(float(expected), rel=1e-3)


def test_what_is_constant_or_hardly_varies_does_not_explode() -> None:
    dense = torch.cat([640 * noise(64, 2).abs(), torch.full((64, 1), 8.0), torch.zeros(64, 1)], 1)
    near = dense + torch.tensor([0.0, 0, 0.08, 0])
    assert float(fit_loss(None, [{"o": dense}])({"o": near}, {"o": dense})) < 1e-4
    scores = torch.cat([noise(64, 2).sigmoid(), 1e-6 * noise(64, 6, seed=1).abs()], 1)  # classes that no sample shows
    near = scores + torch.tensor([0.0, 0, *[1e-4] * 6])
    assert float(fit_loss("squared-error", [{"o": scores}])({"o": near}, {"o": scores})) < 1e-3
    dead = torch.cat([noise(64, 3), torch.zeros(64, 1)], 1)
    assert float(fit_loss("squared-error", [{"o": dead}])({"o": dead + 1e-3}, {"o": dead})) < 1e-2


def test_what_hardly_varies_around_a_large_value_is_still_seen() -> None:
    kelvin = 300 + noise(64, 1)
    assert float(fit_loss(None, [{"o": kelvin}])({"o": torch.full_like(kelvin, 300.0)}, {"o": kelvin})) > 0.8


def test_scales_are_those_of_all_batches() -> None:
    parts = [{"o": 10.0**k * noise(8, 3, 5, seed=k)} for k in range(4)]
    together = {"o": torch.cat([part["o"] for part in parts])}
    wrong = {"o": together["o"] + 1}
    losses = [float(fit_loss(None, given)(wrong, together)) for given in (parts, [together])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one_sample = [{"o": noise(1, 4, seed=k)} for k in range(32)]
    assert math.isfinite(float(fit_loss(None, one_sample)(one_sample[1], one_sample[0])))


@pytest.mark.parametrize("shape", [(), (6,), (6, 1), (6, 1, 1), (6, 3, 4, 5, 2)])
def test_outputs_of_any_rank_are_compared(shape: tuple[int, ...]) -> None:
    dense = noise(*shape)
    loss = fit_loss("squared-error", [{"o": dense}])
    assert float(loss({"o": dense}, {"o": dense})) == 0
    assert float(loss({"o": dense * 2}, {"o": dense})) > 0


def test_entries_masked_in_both_are_left_out() -> None:
    mask = noise(200, 10, seed=3) > 1
    dense, other = logits(), logits() + 0.5 * noise(200, 10, seed=4)
    for value in (-torch.inf, -1e8, float(torch.finfo(torch.float32).min)):
        masked, pruned = ({"o": torch.where(mask, value, v).requires_grad_()} for v in (dense, other))
        kept = (torch.where(mask, -torch.inf, v).softmax(1) for v in (dense, other))
        p, q = kept
        expected = torch.where(mask, 0, p * (p.clamp_min(1e-38) / q.clamp_min(1e-38)).log()).sum(1).mean()
        found = kl_divergence(pruned, masked).detach()
        assert float(found) == pytest.approx(float(expected), rel=1e-4)
        distillation_loss(pruned, masked).backward()
        assert pruned["o"].grad.isfinite().all()
        error = fit_loss("squared-error", [{k: v.detach() for k, v in masked.items()}])
        assert 0 < float(error(pruned, masked).detach()) < 1
    with pytest.raises(LossError, match="one class"):
        cross_entropy({"o": dense}, {"o": dense}, torch.full((200,), 10))


def test_nan_and_one_sided_infinity_are_not_left_out() -> None:
    dense = logits()
    for bad in (math.nan, -math.inf):
        other = dense.clone()
        other[3, 4] = bad
        assert not math.isfinite(float(kl_divergence({"o": other}, {"o": dense})))
        assert not math.isfinite(float(fit_loss("squared-error", [{"o": dense}])({"o": other}, {"o": dense})))


def two_branches(size: float) -> onnx.ModelProto:
    """One output of 2 channels in pixels and 2 in 0..1, each pair made by a layer of its own."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.normal(size=shape) / shape[0] ** 0.5).astype("f4"), name)

    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "trunk"),
        helper.make_node("MatMul", ["h", "wb"], ["b"], "boxes"),
        helper.make_node("MatMul", ["h", "ws"], ["s"], "scores"),
        helper.make_node("Mul", ["b", "size"], ["bp"]),
        helper.make_node("Sigmoid", ["s"], ["sp"]),
        helper.make_node("Concat", ["bp", "sp"], ["output"], axis=2),
    ]
    shape = {"x": ["batch", 20, 32], "output": ["batch", 20, 16]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in shape.items()}
    tensors = [weight("w1", 32, 32), weight("wb", 32, 8), weight("ws", 32, 8)]
    tensors.append(numpy_helper.from_array(np.array(size, "f4"), "size"))
    graph = helper.make_graph(nodes, "g", [values["x"]], [values["output"]], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_objective_sees_a_lost_branch_whatever_the_others_unit_is() -> None:
    samples = Samples({"x": noise(64, 20, 32).numpy()})
    lost = []
    for size in (1.0, 640.0):
        network = Network(Prepared(two_branches(size)))
        objective = Objective(network, samples, corrected=False)
        assert objective.name == PER_CHANNEL
        assert objective({}) == pytest.approx(0, abs=1e-6)
        lost.append(objective({"ws": torch.zeros_like(network.dense("ws"))}))
    assert lost[0] == pytest.approx(lost[1], rel=0.05)
    assert lost[0] > 0.4


def test_a_users_loss_is_known_by_its_code() -> None:
    def make(factor: int):
        space: dict = {}
        exec(f"def loss(outputs, dense, target):\n    return {factor} * outputs['o'].sum()", space)
        return space["loss"]

    names = {loss_name(make(factor)) for factor in (1, 2)}
    assert len(names) == 2
    assert all(name.startswith("loss@") for name in names)
    assert loss_name(make(1)) == loss_name(make(1))


def test_a_users_loss_gets_copies_and_must_return_a_number() -> None:
    def spoils(outputs, dense, target):
        result = (outputs["o"] - dense["o"]).square().mean()
        outputs["o"].zero_()
        dense["o"].zero_()
        target.zero_()
        return result

    with torch.inference_mode():
        dense = {"o": noise(4, 3)}
    target = torch.ones(4)
    before = dense["o"].clone()
    assert float(fit_loss(spoils, [dense])({"o": before + 2}, dense, target)) == pytest.approx(4)
    assert torch.equal(dense["o"], before)
    assert target.sum() == 4
    for fine in (0.5, np.float32(0.5), torch.tensor([0.5])):
        assert float(fit_loss(lambda o, d, t, value=fine: value, [dense])(dense, dense)) == 0.5
    for wrong in (
        "0.5",
        None,
        noise(3),
        torch.tensor(1j),
        [0.5],
        True,
        {"loss": 0.5},
        10**400,
        torch.zeros((), device="meta"),
    ):
        with pytest.raises(LossError, match="one real number"):
            fit_loss(lambda o, d, t, value=wrong: value, [dense])(dense, dense)


@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_outputs_of_another_size_in_each_network_are_refused_by_name(loss) -> None:
    dense = [{"found": torch.rand(size, 4, generator=torch.Generator().manual_seed(size))} for size in (7, 9)]
    fitted = fit_loss(loss, dense)
    with pytest.raises(LossError, match=r"'found'.*\(7, 4\).*\(5, 4\).*NonMaxSuppression"):
        fitted({"found": torch.rand(5, 4)}, dense[0], torch.zeros(5))


def test_batches_in_which_nothing_is_found_scale_no_loss() -> None:
    some, none = {"found": torch.rand(1, 6, 4)}, {"found": torch.zeros(1, 0, 4)}
    fitted = fit_loss("squared-error", [some, none])
    assert float(fitted(none, none)) == 0 and float(fitted({"found": some["found"] + 1}, some)) > 0
    with pytest.raises(LossError, match="no floating-point output"):
        fit_loss("squared-error", [none])


def test_widths_that_differ_from_batch_to_batch_are_no_classes() -> None:
    assert fit_loss(None, [{"y": torch.randn(4, 5)}, {"y": torch.randn(4, 6)}]).name == PER_CHANNEL


def test_samples_on_another_axis_are_no_channels() -> None:
    """Time first: a sample whose outputs are large counts no less than the others, and each channel by its own size."""
    sizes = torch.tensor([1.0, 100.0])
    dense = noise(6, 20, 2) * sizes * torch.linspace(1, 100, 20)[:, None]
    turned = dense.flip(1)
    axes = sample_axes({"o": dense}, {"o": turned}, 20)
    assert axes == {"o": 1}
    loss = fit_loss("squared-error", [{"o": dense}], axes=axes)
    first = fit_loss("squared-error", [{"o": dense.movedim(1, 0)}])
    wrong = dense + noise(6, 20, 2, seed=1) * sizes
    expected = float(first({"o": wrong.movedim(1, 0)}, {"o": dense.movedim(1, 0)}))
    assert float(loss({"o": wrong}, {"o": dense})) == pytest.approx(expected)
    some = dense[:, :7]  # held-out samples, say
    assert math.isfinite(float(loss({"o": some + 1}, {"o": some})))


def test_channels_whose_number_depends_on_the_data_are_refused_by_name() -> None:
    fitted = fit_loss("squared-error", [{"found": noise(4, 5)}])
    with pytest.raises(LossError, match="'found' has 5 channels for some samples and 6 for others"):
        fitted({"found": noise(4, 6)}, {"found": noise(4, 6)})


@pytest.mark.parametrize("time", [6, 16])
def test_an_objective_finds_the_samples_of_each_output(time: int) -> None:
    """Also where there are as many positions as samples in a batch."""
    weight = numpy_helper.from_array(noise(32, 32).numpy() * np.float32([1, 100] * 16), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Transpose", ["a"], ["y"], perm=[1, 0, 2])]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", time, 32])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [time, "batch", 32])
    graph = helper.make_graph(nodes, "g", [given], [made], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    samples = Samples({"x": (noise(16, time, 32) * torch.linspace(1, 50, 16)[:, None, None]).numpy()}, None)
    objective = Objective(Network(Prepared(model)), samples)
    few = Samples({"x": noise(5, time, 32).numpy()}, None)
    assert Objective(Network(Prepared(model)), few, objective.loss).of_batch(0) < 1e-3
    assert objective.of_batch(0) < 1e-3


@pytest.mark.parametrize("kind", ["i8", "u8", "f4", "?"])
def test_classes_may_have_any_type_of_number(kind: str) -> None:
    target = numbers(np.arange(10).astype(kind))
    assert target is not None
    outputs = {"o": logits(10)}
    assert float(cross_entropy(outputs, outputs, target)) == pytest.approx(
        float(torch.nn.functional.cross_entropy(outputs["o"], target.long()))
    )


@pytest.mark.parametrize("wrong", [np.nan, 1.5, -1, 10, np.inf, np.uint64(2**63)])
def test_what_is_no_class_is_refused_in_one_line(wrong) -> None:
    target = numbers(np.array([wrong] * 10))
    with pytest.raises(LossError, match=r"one class of 0\.\.9"):
        cross_entropy({"o": logits(10)}, {"o": logits(10)}, target)
