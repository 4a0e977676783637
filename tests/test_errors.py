"""Every error that a user may see has one base, and its place in the tree that the base's docstring draws."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_spdy.runtimes import OnnxSpdyError
from onnx_spdy.tools.expected import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("models", "pipeline", "runtimes", "tools")
# It runs under an interpreter that doesn't have this package; its errors travel by their kind and become ours here.
ALONE = ROOT / "runtimes" / "deepsparse" / "worker.py"
OF_ANOTHER = ROOT / "runtimes" / "sparse"  # a distribution of its own, which knows nothing of this one
FOR_OTHERS = ("for_lightning", "for_transformers")  # adapters to packages that aren't installed with this one
INDENT = 3  # characters of the tree for each generation


def defined_errors() -> list[type[BaseException]]:
    """Every exception class that a module of ours defines."""
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        if path == ALONE or path.stem in FOR_OTHERS or OF_ANOTHER in path.parents:
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(("onnx_spdy", *parts)).removesuffix(".__init__"))
        own = [
            value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        found += [value for value in own if issubclass(value, BaseException)]
    return found


def drawn_parents() -> dict[str, str | None]:
    """Name -> parent in the docstring's tree."""
    lines = inspect.cleandoc(OnnxSpdyError.__doc__ or "").splitlines()
    lines = lines[lines.index("OnnxSpdyError") :]
    parents: dict[str, str | None] = {}
    ancestors: list[str] = []
    for line in lines:
        name = re.match(r"[|`\- ]*(\w+)", line)
        assert name
        assert name[1] not in parents
        generation = name.start(1) // INDENT
        ancestors[generation:] = [name[1]]
        parents[name[1]] = ancestors[generation - 1] if generation else None
    return parents


def test_every_error_has_the_base_and_is_drawn() -> None:
    errors = defined_errors()
    assert len(errors) > 20
    for error in errors:
        assert issubclass(error, OnnxSpdyError), error
    bases = {
        error.__name__: next((base.__name__ for base in error.__bases__ if issubclass(base, OnnxSpdyError)), None)
        for error in errors
    }
    assert drawn_parents() == bases


def test_every_error_is_a_builtin_too() -> None:
    builtins = (ValueError, RuntimeError)
    assert all(issubclass(error, builtins) for error in defined_errors() if error is not OnnxSpdyError)


def test_the_base_is_light() -> None:
    code = "import sys, onnx_spdy.runtimes.errors; print({'torch', 'onnxruntime', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_expected_errors_become_one_line_and_bugs_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise OnnxSpdyError("too\nlarge")
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: too large\n"
    with pytest.raises(SystemExit), one_line_errors():
        raise FileNotFoundError("no such file")
    with pytest.raises(ValueError, match="bug"), one_line_errors():
        raise ValueError("bug")
