"""The direction of imports, and what the repository must not contain."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("models", "runtimes", "pipeline", "tools")
ALLOWED = {
    "models": {"models"},
    "runtimes": {"runtimes"},
    "pipeline": {"pipeline", "models", "runtimes"},
    "tools": {"tools", "pipeline", "models", "runtimes"},
}
# Every error has one base, every file is written in one way, and samples lie on one axis for all; these travel with
# the runtimes.
EXCEPTIONS = {("models", f"onnx_spdy.runtimes.{name}") for name in ("errors", "atomic", "batch_axes")}
# Rooms of the pipeline from the top floor down; whatever else is there is used by all of them, and uses none.
STAGES = (
    "run", "fleet", "front", "report", "target", "search", "stitch", "int8", "training", "database", "latency",
    "compare", "aim", "opponent", "alternatives", "validate",
)  # fmt: skip
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
ENGINES = {"deepsparse", "openvino", "tensorrt", "onnxruntime"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at import time?) of every import; imports inside functions are not at import time."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.module, id(node) not in inside))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for module, at_import_time in imports(path):
        parts = module.split(".")
        assert parts[0] not in FOLDERS, f"{module} makes a second copy of every class; write onnx_spdy.{module}"
        if parts[0] == "onnx_spdy":
            assert parts[1] in ALLOWED[room] or (room, module) in EXCEPTIONS, f"{room} must not import {module}"
        if room == "runtimes":
            assert not (at_import_time and parts[0] in ENGINES), f"{module} is imported before a runtime is opened"


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").rglob("*.py")), ids=lambda path: path.stem)
def test_no_stage_imports_one_above_it(path: Path) -> None:
    def floor(room: str) -> int:
        return STAGES.index(room) if room in STAGES else len(STAGES)

    own = floor(path.relative_to(ROOT / "pipeline").with_suffix("").parts[0])
    for module, _ in imports(path):
        if module.startswith("onnx_spdy.pipeline."):
            assert floor(module.split(".")[2]) >= own, f"{module} is above it"


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="no tomllib before Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["setuptools"]
    found = {
        "onnx_spdy." + ".".join(path.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in [ROOT / folder, *(ROOT / folder).rglob("*")]
        if path.is_dir() and (path / "__init__.py").exists()
        if not (path.parent / "pyproject.toml").exists() or path.parent == ROOT  # else of another distribution
    }
    assert found == set(settings["packages"])


def test_importing_the_package_starts_no_engine() -> None:
    code = "import sys, onnx_spdy.runtimes, onnx_spdy.models; print({'onnxruntime', 'deepsparse'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
