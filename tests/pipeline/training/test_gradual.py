from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from onnx_spdy.models import Prepared, export_module, find_layers, load_model, prepare, save_model, to_canonical
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.loss import distillation_loss, fit_loss
from onnx_spdy.pipeline.mask import level_violation
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.training.gradual import GradualPruning, KeptZeros, level_at
from onnx_spdy.pipeline.training.match import ParameterMismatch, match_weights

HALF = Level("unstructured", 0.5)


class Convolutions(nn.Module):
    """Convolutions with a BatchNorm each, which the export folds, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(16)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(self.second_norm(self.second(x)))
        return self.head(self.third(x).mean((2, 3)))


class Sequences(nn.Module):
    """Linear layers on sequences, which are stored transposed in the graph; two of them are square."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.query(x)) * self.key(x))


def trained(module: nn.Module, shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    """With statistics and scales that aren't those of a fresh BatchNorm."""
    torch.manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, -1.5, 1.5)
            nn.init.normal_(part.bias)
    module.train()
    for _ in range(3):
        module(torch.randn(16, *shape))
    return module.eval()


@pytest.fixture(scope="module")
def convolutions() -> tuple[nn.Module, onnx.ModelProto]:
    module = trained(Convolutions(), (3, 8, 8))
    return module, prepare(export_module(module, torch.randn(2, 3, 8, 8))).proto


@pytest.fixture(scope="module")
def sequences() -> tuple[nn.Module, onnx.ModelProto]:
    module = trained(Sequences(), (5, 32))
    return module, prepare(export_module(module, torch.randn(2, 5, 32))).proto


def copied(module: nn.Module) -> nn.Module:
    other = type(module)()
    other.load_state_dict(module.state_dict())
    return other.train()


def prunable(model: onnx.ModelProto) -> list[str]:
    return [layer.name for layer in find_layers(model) if layer.prunable]


def train(module: nn.Module, pruning: GradualPruning, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    for step in range(steps):
        torch.manual_seed(1000 * seed + step)
        optimizer.zero_grad()
        module(torch.randn(8, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        pruning.step()


def test_the_schedule_is_the_cubic_one() -> None:
    level = Level("unstructured", 0.9)
    for fraction in (0.0, 0.1, 0.35, 0.8, 1.0):
        expected = 0.9 - 0.9 * (1 - fraction) ** 3
        assert level_at(level, fraction).sparsity == pytest.approx(expected, abs=5e-5)
    assert level_at(level, 0.0) == DENSE
    assert [str(level_at(Level.parse("1:4"), f / 10)) for f in (0, 1, 2, 4, 6, 10)] == [
        "dense", "dense", "3:4", "2:4", "2:4", "1:4",
    ]  # fmt: skip


@pytest.mark.parametrize("level", [HALF, Level.parse("2:4"), Level("block4", 0.6)], ids=str)
def test_a_module_pruned_in_its_own_loop_exports_to_the_profile(
    convolutions: tuple[nn.Module, onnx.ModelProto], level: Level
) -> None:
    module, model = copied(convolutions[0]), convolutions[1]
    names = [layer.name for layer in find_layers(model) if layer.weight in ("second.weight", "third.weight")]
    pruning = GradualPruning(module, model, dict.fromkeys(names, level), steps=20, every=2)
    train(module, pruning, torch.optim.SGD(module.parameters(), 0.05, momentum=0.9, weight_decay=0.1), 30, 0)
    exported = prepare(export_module(module.eval(), torch.randn(2, 3, 8, 8))).proto
    assert [node.name for node in exported.graph.node] == [node.name for node in model.graph.node]
    network = Network(Prepared(exported))
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            network.run(Samples({"input": images.numpy()}))["output"], module(images), rtol=1e-3, atol=1e-4
        )
    for layer in network.layers:
        weight = to_canonical(layer, network.dense(layer.weight)).numpy()
        if layer.name in names:
            assert level_violation(weight, level) is None
            assert (weight == 0).mean() == pytest.approx(level.sparsity, abs=0.03)
        else:
            assert (weight == 0).mean() < 0.01


def test_zeros_survive_momentum_and_weight_decay_and_never_come_back(
    convolutions: tuple[nn.Module, onnx.ModelProto],
) -> None:
    module, model = copied(convolutions[0]), convolutions[1]
    pruning = GradualPruning(module, model, dict.fromkeys(prunable(model), HALF), steps=10, every=1)
    optimizer = torch.optim.AdamW(module.parameters(), 0.05, weight_decay=0.5)
    zeros = module.second.weight.detach() == 0
    sparsities = []
    for step in range(15):
        train(module, pruning, optimizer, 1, step)
        now = module.second.weight.detach() == 0
        assert bool((now | ~zeros).all())
        zeros = now
        sparsities.append(pruning.sparsity()["second.weight"])
    assert pruning.finished
    assert sparsities == sorted(sparsities)
    assert sparsities[9:] == [pytest.approx(0.5)] * 6
    assert sparsities[0] == pytest.approx(0.5 * (1 - 0.9**3), abs=1e-3)


def test_a_loop_that_was_stopped_goes_on_the_same_way(convolutions: tuple[nn.Module, onnx.ModelProto]) -> None:
    model = convolutions[1]
    levels = dict.fromkeys(prunable(model), HALF)

    def fresh() -> tuple[nn.Module, GradualPruning, torch.optim.Optimizer]:
        module = copied(convolutions[0])
        return module, GradualPruning(module, model, levels, steps=12), torch.optim.Adam(module.parameters(), 0.01)

    whole = fresh()
    train(*whole, 7, 0)
    train(*whole, 9, 1)
    first, second = fresh(), fresh()
    train(*first, 7, 0)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    train(*second, 9, 1)
    for name, values in whole[0].state_dict().items():
        assert torch.equal(values, second[0].state_dict()[name]), name
    assert second[1].finished
    with pytest.raises(ValueError, match="another module or profile"):
        GradualPruning(copied(convolutions[0]), model, {prunable(model)[0]: HALF}, steps=1).load_state_dict(
            first[1].state_dict()
        )


def test_batch_norm_folding_only_scales_channels(convolutions: tuple[nn.Module, onnx.ModelProto]) -> None:
    module, model = convolutions
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    layer = next(layer for layer in find_layers(model) if layer.weight == "second.weight")
    assert not np.allclose(stored["second.weight"], module.second.weight.detach().numpy())
    renamed = nn.ParameterDict({str(n): values for n, values in enumerate(module.parameters())})  # no name to go by
    found = match_weights(renamed, model, [layer.name])[layer.name]
    assert renamed[found.name] is module.second.weight


def test_transposed_weights_are_found_by_their_values(sequences: tuple[nn.Module, onnx.ModelProto]) -> None:
    module, model = sequences
    found = match_weights(module, model, prunable(model))
    assert sorted(one.name for one in found.values()) == ["key.weight", "out.weight", "query.weight"]
    level = Level.parse("2:4")
    module = copied(module)
    GradualPruning(module, model, dict.fromkeys(prunable(model), level), steps=0)
    assert all(level_violation(part.weight.detach().numpy(), level) is None for part in module.children())
    network = Network(prepare(export_module(module, torch.randn(2, 5, 32))))
    for layer in network.layers:
        assert level_violation(to_canonical(layer, network.dense(layer.weight)).numpy(), level) is None


def test_a_wrapped_module_is_found_after_it_was_trained(convolutions: tuple[nn.Module, onnx.ModelProto]) -> None:
    module, model = copied(convolutions[0]), convolutions[1]
    nn.init.normal_(module.second.weight)
    wrapper = nn.ModuleDict({"model": module})
    names = [layer.name for layer in find_layers(model) if layer.weight == "second.weight"]
    assert match_weights(wrapper, model, names)[names[0]].name == "model.second.weight"


def test_what_cannot_be_told_apart_is_refused(sequences: tuple[nn.Module, onnx.ModelProto]) -> None:
    module, model = copied(sequences[0]), sequences[1]
    of_key = next(name for name, one in match_weights(module, model, prunable(model)).items() if "key" in one.name)
    module.query.load_state_dict({**module.key.state_dict(), "bias": torch.zeros(32)})
    with pytest.raises(ParameterMismatch, match=r"query\.weight, key\.weight; give names="):
        match_weights(module, model, [of_key])
    assert match_weights(module, model, [of_key], {of_key: "key.weight"})[of_key].name == "key.weight"
    nn.init.normal_(module.key.weight)
    nn.init.normal_(module.query.weight)
    with pytest.raises(ParameterMismatch, match="not even up to a factor"):
        match_weights(module, model, [of_key])
    with pytest.raises(ParameterMismatch, match="shape"):
        match_weights(module, model, [of_key], {of_key: "out.weight"})
    with pytest.raises(ParameterMismatch, match="no layer 'nothing'"):
        match_weights(module, model, ["nothing"])


class Levels(nn.Module):
    """One convolution on two levels, each with a norm of its own, which the export folds into two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.head = nn.Conv2d(16, 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large, small = (norm(self.shared(v)) for norm, v in zip(self.norms, (x, x[:, :, ::2, ::2]), strict=True))
        return self.head(torch.relu(large[:, :, :4, :4] * small))


def test_one_convolution_with_several_norms_is_not_pruned_for_one_of_them() -> None:
    module = trained(Levels(), (3, 8, 8))
    model = prepare(export_module(module, torch.randn(2, 3, 8, 8))).proto
    shared = [layer.name for layer in find_layers(model) if layer.shape == (16, 3, 3, 3)]
    assert len(shared) == 2
    for name in shared:
        with pytest.raises(ParameterMismatch, match=r"both parameter 'shared\.weight'"):
            GradualPruning(module, model, {name: HALF}, steps=0)
    assert float((module.shared.weight == 0).float().mean()) == 0
    (head,) = set(prunable(model)) - set(shared)
    GradualPruning(module, model, {head: HALF}, steps=0)
    assert float((module.head.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_computed_from_parameters_is_refused(norm) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 16)).eval()
    model = prepare(export_module(module, torch.randn(2, 32))).proto
    with pytest.raises(ParameterMismatch, match="remove the parametrisation first"):
        GradualPruning(module, model, dict.fromkeys(prunable(model), HALF), steps=0)


def test_parameters_that_are_replaced_are_followed(convolutions: tuple[nn.Module, onnx.ModelProto]) -> None:
    module, model = copied(convolutions[0]), convolutions[1]
    pruning = GradualPruning(module, model, dict.fromkeys(prunable(model), HALF), steps=0)
    module.load_state_dict(convolutions[0].state_dict(), assign=True)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()  # the other module keeps its own
    assert pruning.sparsity()["second.weight"] == pytest.approx(0.5)
    assert float((module.second.weight == 0).float().mean()) == pytest.approx(0.5)
    module.second = nn.Conv2d(16, 16, 1)
    with pytest.raises(ParameterMismatch, match="another shape"):
        pruning.step()


def test_an_averaged_copy_is_pruned_when_it_is_asked_for(convolutions: tuple[nn.Module, onnx.ModelProto]) -> None:
    module, model = copied(convolutions[0]), convolutions[1]
    averaged = torch.optim.swa_utils.AveragedModel(module)
    pruning = GradualPruning(module, model, dict.fromkeys(prunable(model), HALF), steps=0)
    averaged.update_parameters(module)
    averaged.update_parameters(copied(convolutions[0]))
    assert float((averaged.module.second.weight == 0).float().mean()) < 0.1
    pruning.apply_to(averaged)
    assert torch.equal(averaged.module.second.weight == 0, module.second.weight == 0)
    with pytest.raises(ParameterMismatch, match="the copy has no parameter"):
        pruning.apply_to(nn.Linear(2, 2))


def test_kept_zeros_swallow_nan() -> None:
    weight = torch.tensor([0.0, 1.0, 2.0])
    kept = KeptZeros({"weight": weight})
    weight[0] = torch.nan
    kept.step()
    assert weight.tolist() == [0.0, 1.0, 2.0]
    assert not np.signbit(weight.numpy()).any()


def test_distillation_is_the_divergence_from_the_dense_network() -> None:
    torch.manual_seed(0)
    dense = torch.randn(6, 5)
    mine = torch.randn(6, 5, requires_grad=True)
    for temperature in (1.0, 4.0):
        p, q = (dense / temperature).softmax(1), (mine / temperature).softmax(1)
        expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
        torch.testing.assert_close(distillation_loss(mine, dense, temperature), expected)
    distillation_loss(mine, dense).backward()
    assert mine.grad is not None
    boxes, theirs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(
        distillation_loss({"boxes": boxes}, {"boxes": theirs}, loss=fit_loss("squared-error", [{"boxes": theirs}])),
        distillation_loss({"boxes": boxes}, {"boxes": theirs}),
    )


def test_a_written_file_keeps_every_zero(convolutions: tuple[nn.Module, onnx.ModelProto], tmp_path: Path) -> None:
    module, model = copied(convolutions[0]), convolutions[1]
    GradualPruning(module, model, dict.fromkeys(prunable(model), HALF), steps=0)
    save_model(prepare(export_module(module, torch.randn(2, 3, 8, 8))).proto, tmp_path / "pruned.onnx")
    written = {t.name: onnx.numpy_helper.to_array(t) for t in load_model(tmp_path / "pruned.onnx").graph.initializer}
    for name in ("first.weight", "second.weight", "third.weight"):
        expected = dict(module.named_parameters())[name].detach().numpy() == 0
        assert (written[name] == 0).tolist() == expected.tolist()
