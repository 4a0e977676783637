"""The demo: train a small network on scikit-learn's digits, prune it to 2x for the sparse engine, measure what was won.

python -m onnx_spdy.tools.demo [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

from onnx_spdy.models import export_module, input_dtypes, input_shapes, prepare
from onnx_spdy.pipeline.data import Samples, as_samples, workload_of
from onnx_spdy.pipeline.metric import Evaluation, top1
from onnx_spdy.pipeline.progress import Watch
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.pipeline.validate import validate
from onnx_spdy.runtimes import RuntimeFailure, Workload, open_runtime
from onnx_spdy.tools import show
from onnx_spdy.tools.expected import one_line_errors
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.report.page import write_report_html

RUNTIME = "sparse"
SPEEDUP = 2.0
BATCH = 64
EPOCHS = 12
SEED = 0


class DigitsNet(nn.Module):
    """Six 3x3 convolutions on 8x8 images; wide enough for sparse kernels to have something to win."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 64, 128, 128, 128, 192, 192]
        strides = [1, 1, 1, 1, 2, 1]
        blocks: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            blocks += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """((images, labels) to train on, (images, labels) to evaluate on); images float32 (n, 1, 8, 8) in 0..1."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=500, random_state=SEED, stratify=labels
    )
    return (train, train_labels), (test, test_labels)


def train(images: np.ndarray, labels: np.ndarray) -> nn.Module:
    """A network trained for `EPOCHS`."""
    torch.manual_seed(SEED)
    network = DigitsNet()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    x = torch.from_numpy(images).to(memory_format=torch.channels_last)
    y = torch.from_numpy(labels)
    steps = EPOCHS * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    network.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main(folder: Path) -> None:
    """Train, prune, measure, and say what was won and what was lost."""
    (images, labels), (test_images, test_labels) = digits()
    print(f"training a small network on {len(images)} digits")
    network = train(images, labels)
    dense = prepare(export_module(network, (torch.zeros(2, 1, 8, 8),)))
    shapes, dtypes = input_shapes(dense.proto), input_dtypes(dense.proto)
    samples = as_samples({"input": images, "target": labels}, shapes, dtypes)
    evaluation = as_samples({"input": test_images, "target": test_labels}, shapes, dtypes)
    name = _available_runtime()
    out = folder / name
    with open_runtime(name) as runtime, ProgressBars() as bars:
        report = run(
            dense, samples, runtime, workload_of(samples, BATCH), Target(SPEEDUP, out),
            search=SearchSettings(seed=SEED), evaluation=Evaluation(evaluation, top1, "top1"),
            allow_busy=True, watch=Watch(bars.stage),
        )  # fmt: skip
    write_report_html(report.content, out / "report.html")
    show.report(report.content, out)
    _say_what_was_lost(report.content)
    if name == "fake":
        _measure_in_onnxruntime(out, samples)


def _available_runtime() -> str:
    try:
        with open_runtime(RUNTIME) as runtime:
            runtime.check()
    except RuntimeFailure as exc:
        print(f"The sparse engine can't run here: {exc}")
        print("The demo goes on with the table of the `fake` runtime: times of a formula, NOT of an engine.")
        return "fake"
    return RUNTIME


def _say_what_was_lost(content) -> None:
    lost = 100 * (content["metric_dense"] - content["metric_pruned"])
    print(
        f"won: {content['measured_speedup']:.2f}x in {content['runtime']}; "
        f"lost: {lost:.1f} points of top-1 ({100 * content['metric_dense']:.1f} % -> "
        f"{100 * content['metric_pruned']:.1f} %), one-shot, without retraining"
    )


def _measure_in_onnxruntime(out: Path, samples: Samples) -> None:
    """What the file does in a real engine without sparse kernels."""
    with open_runtime("onnxruntime") as runtime:
        found = validate(out / "dense.onnx", out / "model.onnx", runtime, Workload(BATCH))
    print(f"measured in ONNX Runtime, which has no sparse kernels: {found.speedup:.2f}x")


if __name__ == "__main__":
    with one_line_errors():
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/demo"))
