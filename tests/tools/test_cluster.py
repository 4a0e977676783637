"""`--cluster` on the command line: the same files, and one line where there is no cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import distributed
import pytest

from onnx_spdy.pipeline import cluster
from onnx_spdy.tools.cli import main
from tests.tools.test_cli import NETWORK

USER = f"""{NETWORK}
from below import SCALE

def half(weight, hessian, level):
    kept = weight.abs().flatten().argsort(descending=True)[: int(weight.numel() * (1 - level.sparsity))]
    mask = weight.new_zeros(weight.numel())
    mask[kept] = SCALE
    return weight * mask.view_as(weight)

def loss(outputs, dense, target):
    return SCALE * (outputs["output"] - dense["output"]).square().mean()
"""
RUN = ("run", "user.py:network", "--data", "user.py:data", "--runtime", "fake", "--batch", "8", "--speedup", "1.3",
       "--loss", "user.py:loss", "--pruner", "user.py:half", "--search-images", "200")  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "below.py").write_text("SCALE = 1.0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scheduler(folder: Path) -> Iterator[str]:
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as local:
        yield local.scheduler_address


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_a_run_with_functions_of_your_own_gives_the_same_files(scheduler: str, folder: Path) -> None:
    assert exit_code(*RUN, "--out", "here") == 0
    assert exit_code(*RUN, "--out", "there", "--cluster", scheduler) == 0
    for name in ("model.onnx", "database/index.json", "database/0000.safetensors", "profile.json"):
        assert (folder / "there" / name).read_bytes() == (folder / "here" / name).read_bytes(), name


@pytest.mark.parametrize("address", ["", "localhost", "tcp://host", "http://host:8786", "tcp://host:many"])
def test_what_is_no_address_is_wrong_usage(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*RUN, "--out", "out", "--cluster", address) == 2
    assert "is no address of a Dask scheduler" in re.sub(r"[│\s]+", " ", capsys.readouterr().err)


def test_where_nobody_answers_it_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    command = (
        "database",
        "user.py:network",
        "--data",
        "user.py:data",
        "--out",
        "out",
        "--cluster",
        "tcp://127.0.0.1:9",
    )
    assert exit_code(*command) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: no Dask scheduler answers at tcp://127.0.0.1:9")
    assert len([line for line in errors if "error" in line]) == 1
    assert not (folder / "out").exists()
