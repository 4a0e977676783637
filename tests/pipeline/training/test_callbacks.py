"""With the real packages where they are installed; else with stand-ins that call what they are documented to call.

The order of calls is that of transformers' `Trainer.train` (on_train_begin, on_step_end after each optimizer step,
on_train_end) and of Lightning's training loop (on_train_start, on_train_batch_end after each batch, `global_step`
counts optimizer steps; a checkpoint's callback state is given to `load_state_dict` before training starts).
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from onnx_spdy.models import export_module, find_layers, prepare
from onnx_spdy.pipeline.level import Level

HALF = Level("unstructured", 0.5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return prepare(export_module(network(), torch.zeros(2, 16))).proto


def levels(model: onnx.ModelProto) -> dict[str, Level]:
    return {layer.name: HALF for layer in find_layers(model) if layer.prunable}


def sparsities(module: nn.Module) -> list[float]:
    return [float((values == 0).float().mean()) for values in module.parameters() if values.ndim == 2]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def callback_class(monkeypatch: pytest.MonkeyPatch, package: str, stand_in: dict[str, Any]) -> Any:
    """PruningCallback of a package, on a stand-in for its base class where the package is not installed."""
    if not installed(package):
        for name, content in stand_in.items():
            part = types.ModuleType(name)
            part.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, part)
    name = f"onnx_spdy.pipeline.training.for_{package}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name).PruningCallback


HUGGING_FACE = {"transformers": {"TrainerCallback": object}}
LIGHTNING = {
    "lightning": {}, "lightning.pytorch": {}, "lightning.pytorch.callbacks": {"Callback": object},
}  # fmt: skip


def one_step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    module(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()


def test_hugging_face_calls_end_at_the_profile(monkeypatch: pytest.MonkeyPatch, model: onnx.ModelProto) -> None:
    callback = callback_class(monkeypatch, "transformers", HUGGING_FACE)(model, levels(model), share=0.5)
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.1)
    state = SimpleNamespace(max_steps=20, global_step=0)
    callback.on_train_begin(None, state, None, model=module)
    seen = []
    for step in range(20):
        one_step(module, optimizer, step)
        state.global_step += 1
        callback.on_step_end(None, state, None, model=module)
        seen.append(sparsities(module)[0])
    callback.on_train_end(None, state, None, model=module)
    assert seen == sorted(seen)
    assert seen[4] < 0.5
    assert seen[9:] == [0.5] * 11
    assert sparsities(module) == [0.5, 0.5]


def test_hugging_face_resumes_with_the_zeros_of_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, model: onnx.ModelProto
) -> None:
    create = callback_class(monkeypatch, "transformers", HUGGING_FACE)
    first, module = create(model, levels(model)), network()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    state = SimpleNamespace(max_steps=20, global_step=0)
    first.on_train_begin(None, state, None, model=module)
    for step in range(6):
        one_step(module, optimizer, step)
        state.global_step += 1
        first.on_step_end(None, state, None)
    before = sparsities(module)
    second = create(model, levels(model))
    second.on_train_begin(None, state, None, model=module)
    for step in range(6, 20):
        one_step(module, optimizer, step)
        state.global_step += 1
        second.on_step_end(None, state, None)
        assert sparsities(module) >= before
    assert sparsities(module) == [0.5, 0.5]


def test_lightning_calls_end_at_the_profile_and_resume(monkeypatch: pytest.MonkeyPatch, model: onnx.ModelProto) -> None:
    create = callback_class(monkeypatch, "lightning", LIGHTNING)

    def go(callback: Any, module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        trainer = SimpleNamespace(estimated_stepping_batches=20, global_step=first)
        callback.on_train_start(trainer, module)
        for batch in range(2 * first, 2 * last):  # two batches are accumulated for each step
            if batch % 2:
                one_step(module, optimizer, batch)
                trainer.global_step += 1
            callback.on_train_batch_end(trainer, module, None, None, batch)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = network()
        return module, torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)

    whole = fresh()
    go(create(model, levels(model)), *whole, 0, 20)
    assert sparsities(whole[0]) == [0.5, 0.5]
    parts, callback = fresh(), create(model, levels(model))
    go(callback, *parts, 0, 7)
    assert 0 < sparsities(parts[0])[0] < 0.5
    saved, callback = callback.state_dict(), create(model, levels(model))
    callback.load_state_dict(saved)
    go(callback, *parts, 7, 20)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), parts[0].parameters(), strict=True))


@pytest.mark.skipif(not installed("transformers"), reason="transformers is not installed")
def test_a_real_hugging_face_trainer(model: onnx.ModelProto, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from onnx_spdy.pipeline.training.for_transformers import PruningCallback

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            found = self.network(x)
            return {"loss": found.square().mean(), "logits": found}

    def train(steps: int, resume: bool) -> nn.Module:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=20, save_steps=7, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            weight_decay=0.1, disable_tqdm=True, gradient_accumulation_steps=2, save_only_model=False,
        )  # fmt: skip
        data = [{"x": row} for row in torch.randn(64, 16, generator=torch.Generator().manual_seed(0))]
        module = Squared()
        callback = PruningCallback(model, levels(model))
        trainer = Trainer(module, arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7") if resume else None)
        assert callback.pruning is not None and callback.pruning.finished
        return module

    for resume in (False, True):
        assert sparsities(train(20, resume)) == [0.5, 0.5]


@pytest.mark.skipif(not installed("lightning"), reason="lightning is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_real_lightning_trainer(model: onnx.ModelProto, tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from onnx_spdy.pipeline.training.for_lightning import PruningCallback

    class Squared(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
            return self.network(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)

    data = torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=4)

    def train(resume: Path | None) -> Squared:
        module, callback = Squared(), PruningCallback(model, levels(model))
        trainer = Trainer(
            max_steps=20, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[callback, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=resume, weights_only=False if resume else None)
        assert callback.pruning is not None and callback.pruning.done == 20
        return module

    assert sparsities(train(None)) == [0.5, 0.5]
    assert sparsities(train(tmp_path / "step=6.ckpt")) == [0.5, 0.5]
