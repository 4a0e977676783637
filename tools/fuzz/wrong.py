"""Wrong arguments, files and functions of every command: each ends in one line or in the usage, none in a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from onnx_spdy.runtimes.atomic import WorkFolder
from onnx_spdy.tools.fuzz import wrong_functions
from onnx_spdy.tools.fuzz.child import Outcome, ended, import_everything
from onnx_spdy.tools.fuzz.damage import damaged_bytes
from onnx_spdy.tools.fuzz.setting import DATA, NETWORK, RUN, cleared, make, prune

FAST = ("--search", "dp", "--pruner", "magnitude")
CALLS: dict[str, tuple[str, ...]] = {
    "run": ("run", NETWORK, *RUN[2:], *FAST, "--out", "new"),
    "inspect": ("inspect", NETWORK, "--data", DATA),
    "prepare": ("prepare", NETWORK, "--data", DATA, "--out", "new.onnx"),
    "measure": ("measure", NETWORK, "--data", DATA, "--runtime", "fake", "--batch", "64", "--out", "new.json"),
    "database": ("database", NETWORK, "--data", DATA, "--pruner", "magnitude", "--out", "new"),
    "search": (
        "search", NETWORK, "--latency", "out/latency.json", "--database", "out/database", "--data", DATA, "--search",
        "dp", "--speedup", "1.3", "--out", "new.json",
    ),
    "deploy": (
        "deploy", NETWORK, "--database", "out/database", "--profile", "out/profile.json", "--data", DATA, "--finetune",
        "gap", "--out", "new.onnx",
    ),
    "finetune": (
        "finetune", NETWORK, "out/model.onnx", "--data", DATA, "--epochs", "1", "--out", "new.onnx",
    ),
    "validate": (
        "validate", "out/dense.onnx", "out/model.onnx", "--runtime", "fake", "--data", DATA, "--json", "new.json",
    ),
    "report": ("report", "out"),
}  # fmt: skip
PATHS = (
    "", " ", "missing", "missing/below", ".", "..", "/", "/dev/null", "empty.onnx", "text.npz", "text.json", "zip.npz",
    "loop", "data.npz", "net.onnx", "out", "out/latency.json", "out/database", "out/profile.json", "out/report.json",
    "out/database/0000.safetensors", "empty", "text", "n" * 300 + ".onnx", "a\nb", "~nobody/x", "~", "--out",
    "pickle.npz", "array.npy", "user.py", "user.py:", ":f", "user.py:nothing", "user.py:a.b", "broken.py:f",
    "missing.py:f",
    "exits.py:f", "text.py:f", "out.py:f", "locked/x", "\udcff.npz",
)  # fmt: skip
NUMBERS = (
    "", " ", "0", "-1", "-0", "1", "2", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "1e18", "9" * 30, "9" * 5000,
    "0x10", "1_0", "\N{FULLWIDTH DIGIT ONE}", "1,2", "1,,2", ",", "two", "1 2", "True", "1e3", "2147483648", "--seed",
)  # fmt: skip
NAMES = (
    "", " ", "nothing", "Fake", "fake ", "fake:bf16", "onnxruntime:", ":", "ssh://", "ssh://nobody.invalid/fake",
    "ssh:///fake", "ssh://-oProxyCommand=x/fake", "openvino:fp64", "2:4", "4:2", "0:4", "3:3", "a:b", "-1:4", "2:4:8",
    "unstructured,unstructured", "unstructured,", "block4,2:4", "1000000:2000000", "none", "gap,gap", "__class__",
    "kl,kl", "top5", "a\nb", "\x1b[31m", "n" * 5000, "--help",
)  # fmt: skip
KIND_OF_OPTION = {
    "--data": "data", "--eval": "data", "--metric": "metric", "--loss": "loss", "--pruner": "pruner",
}  # fmt: skip
PATH_OPTIONS = ("--data", "--eval", "--out", "--latency", "--database", "--profile", "--json")
NUMBER_OPTIONS = (
    "--batch", "--speedup", "--seed", "--threads", "--memory", "--search-samples", "--search-images", "--time-limit",
    "--epochs", "--learning-rate",
)  # fmt: skip
NAME_OPTIONS = ("--runtime", "--pattern", "--pruner", "--search", "--loss", "--metric", "--finetune")
OPTIONS = {
    "run": ("--data", "--eval", "--out", *NUMBER_OPTIONS[:8], *NAME_OPTIONS),
    "inspect": ("--data",),
    "prepare": ("--data", "--out"),
    "measure": ("--data", "--out", "--batch", "--threads", "--seed", "--runtime", "--pattern"),
    "database": ("--data", "--out", "--pattern", "--pruner", "--memory"),
    "search": (
        "--data", "--out", "--latency", "--database", "--speedup", "--search", "--loss", "--search-samples",
        "--search-images", "--seed", "--time-limit",
    ),
    "deploy": ("--data", "--out", "--database", "--profile", "--finetune", "--seed"),
    "finetune": (
        "--data", "--out", "--profile", "--epochs", "--learning-rate", "--batch", "--seed", "--time-limit",
    ),
    "validate": ("--data", "--runtime", "--batch", "--threads", "--metric", "--json"),
    "report": (),
}  # fmt: skip
TAKES_FUNCTION = CALLS.keys() - {"validate", "report"}
POSITIONS = {"finetune": 2, "validate": 2}  # how many arguments a command has; others have one


def trials(count: int, seed: int, first: int = 0, keep: Path | None = None) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of `count` wrong calls from number `first` on: the kinds in turns, in an order that the seed makes."""
    import_everything()
    everything = calls(seed)
    with WorkFolder() as work:
        sound = make(Path(work) / "sound")
        prune(sound, (*RUN, *FAST))
        _make_files(sound, np.random.default_rng(seed))
        for number in range(first, first + count):
            call = everything[number % len(everything)]
            case = Path(work) / "case"
            shutil.copytree(sound, case, symlinks=True)
            (case / "locked").chmod(0o500)
            done = ended(call, case, Path(work) / "printed")
            trouble = done.trouble or ("no word" if done.code == 2 and not done.err.strip() else None)
            what = " ".join(word if len(word) < 60 else f"{word[:57]}..." for word in call).encode("utf8", "replace")
            outcome = Outcome(trouble, done.became, done.text, what.decode(), done.seconds, done.memory_bytes)
            yield number, cleared(outcome, case, number, keep)


def calls(seed: int) -> list[tuple[str, ...]]:
    """All wrong calls, in such an order that every first few hundred hold all kinds."""
    kinds: list[list[tuple[str, ...]]] = [[] for _ in range(5)]
    for name, call in CALLS.items():
        for option in OPTIONS[name]:
            kinds[0] += [_with(call, option, value) for value in PATHS if option in PATH_OPTIONS]
            kinds[1] += [_with(call, option, value) for value in NUMBERS if option in NUMBER_OPTIONS]
            kinds[2] += [_with(call, option, value) for value in NAMES if option in NAME_OPTIONS]
            if kind := KIND_OF_OPTION.get(option):
                kinds[3] += [_with(call, option, _function(kind, one)) for one in wrong_functions.KINDS[kind]]
        for position in range(1, 1 + POSITIONS.get(name, 1)):
            values = [
                *PATHS,
                *(
                    _function("model", one)
                    for one in wrong_functions.MODELS
                    if name in TAKES_FUNCTION and position == 1
                ),
            ]
            kinds[4] += [(*call[:position], value, *call[position + 1 :]) for value in values]
        kinds[4] += [(*call[:place], *call[place + 1 :]) for place in range(len(call))]  # a word less
        kinds[4] += [(*call[:place], call[place], *call[place:]) for place in range(len(call))]  # a word twice
    rng = np.random.default_rng(seed)
    shuffled = [[kind[one] for one in rng.permutation(len(kind))] for kind in kinds]
    turns = max(map(len, shuffled))
    return [kind[turn] for turn in range(turns) for kind in shuffled if turn < len(kind)]


def _function(kind: str, name: str) -> str:
    return f"user.py:{kind}_{name}"


def _with(call: Sequence[str], option: str, value: str) -> tuple[str, ...]:
    """The call with another value of an option, or with that option."""
    if option not in call:
        return (*call, option, value)
    place = len(call) - 1 - call[::-1].index(option)
    return (*call[: place + 1], value, *call[place + 2 :])


def _make_files(folder: Path, rng: np.random.Generator) -> None:
    """Files that are no networks and no data."""
    shutil.copyfile(wrong_functions.__file__, folder / "user.py")
    for name in ("empty.onnx", "empty"):
        (folder / name).write_bytes(b"")
    for name in ("text.npz", "text.json", "text"):
        (folder / name).write_text("nothing of use\n")
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(2)\n")
    (folder / "text.py").write_bytes(b"\xff\xfe nothing")
    (folder / "out.py").write_text("import no_such_module\n")
    (folder / "zip.npz").write_bytes(damaged_bytes((folder / DATA).read_bytes(), rng))
    np.savez(folder / "pickle.npz", input=np.array([None, {}], object))
    np.save(folder / "array.npy", np.zeros(3))
    (folder / "loop").symlink_to("loop")
    (folder / "locked").mkdir()
