"""Kept files of a run, each damaged once: the same call then ends with the same results, or in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_spdy.pipeline.artifact import CHECKSUM, write_json
from onnx_spdy.runtimes.atomic import WorkFolder
from onnx_spdy.tools.fuzz.child import Outcome, ended, import_everything
from onnx_spdy.tools.fuzz.damage import damaged_bytes, damaged_fields
from onnx_spdy.tools.fuzz.setting import OUT, RUN, cleared, differing, make, prune, results

CALL = (*RUN, "--pruner", "magnitude")  # whose weights a repair changes
OTHER_CALLS = (
    (*CALL, "--seed", "1"),
    (*RUN, "--pruner", "obs"),
    (*CALL, "--speedup", "1.3"),
    (*CALL, "--batch", "32"),
)  # whose files are whole, but not this run's
TABLE, WITH_OTHER_SEED = "latency.json", 1
Other = Callable[[int], Path]
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**70, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), "", "x", "../../outside",
    [], {}, [None], {"x": 1}, [[[]]],
)  # fmt: skip
SHOWN = ("dense.onnx", "model.onnx", "profile.json", "report.json")  # search.json is replaced when it is asked again
AS_IT_WAS = "accepted, same results"
RENEWED = "accepted, other results: the checksum fits"


def trials(count: int, seed: int, first: int = 0, keep: Path | None = None) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of `count` damaged folders from number `first` on."""
    import_everything()
    with WorkFolder() as work:
        sound = make(Path(work) / "sound")
        prune(sound, CALL)

        @cache
        def other(number: int) -> Path:
            """The results of another run; the first one is the same call for another network."""
            folder = make(Path(work) / f"other{number}", seed=int(number == 0))
            prune(folder, (CALL, *OTHER_CALLS)[number])
            return folder / OUT

        for number in range(first, first + count):
            case = Path(work) / "case"
            outcome = _trial(number, np.random.default_rng([seed, number]), case, sound, other)
            yield number, cleared(outcome, case, number, keep)


def _trial(number: int, rng: np.random.Generator, case: Path, sound: Path, other: Other) -> Outcome:
    shutil.copytree(sound, case)
    expected = results(sound / OUT)
    name = [*expected][number % len(expected)]
    what, renewed = damage(case / OUT / name, name, rng, other)
    done = ended(CALL, case, case / "printed")
    trouble, became = done.trouble, done.became
    if not trouble and done.code == 0:
        different = [one for one in differing(expected, results(case / OUT)) if one in SHOWN]
        became = AS_IT_WAS
        if different and renewed:
            became = RENEWED
        elif different:
            trouble = f"silent difference in {', '.join(different)}"
    elif not trouble and done.code == 2:
        trouble = "wrong usage"
    return Outcome(trouble, became, done.text, f"{name}: {what}", done.seconds, done.memory_bytes)


def damage(file: Path, name: str, rng: np.random.Generator, other: Other) -> tuple[str, bool]:
    """Damage one file of a folder.

    Args:
        other: gives the folder of another run, whose file of this name may take its place.
    Returns:
        What was done, and whether the file's checksum was made to fit.
    """
    kind = rng.random()
    if kind < 0.08:
        return _away(file, rng), False
    if kind < 0.2:
        number = int(rng.integers(1 + len(OTHER_CALLS)))
        shutil.copyfile(other(number) / name, file)
        # A table of the same network and setting is as good, whenever and with whatever seed it was measured.
        return f"that of other {number}", name == TABLE and number == WITH_OTHER_SEED
    if kind < 0.5:
        file.write_bytes(damaged_bytes(file.read_bytes(), rng))
        return "bytes", False
    return _FIELDS[file.suffix](file, rng)


def _away(file: Path, rng: np.random.Generator) -> str:
    kind = rng.integers(4)
    if kind == 0:
        file.write_bytes(b"")
        return "emptied"
    if kind == 1:
        file.write_bytes(file.read_bytes()[: int(rng.integers(file.stat().st_size))])
        return "cut"
    file.unlink()
    if kind == 2:
        file.mkdir()
        return "a folder in its place"
    file.symlink_to("nowhere")
    return "a link to nowhere"


def _json(file: Path, rng: np.random.Generator) -> tuple[str, bool]:
    document = json.loads(file.read_text())
    what = change(document, rng)
    if rng.random() < 0.7:
        file.write_text(json.dumps(document, indent=1))
        return what, False
    kind, version = str(document.pop("format", "")).removeprefix("onnx_spdy."), document.pop("version", 1)
    document.pop(CHECKSUM, None)
    try:
        write_json(file, kind, version, document)
    except ValueError:  # NaN can't be written in this way
        file.write_text(json.dumps({"format": f"onnx_spdy.{kind}", "version": version, **document}))
    return f"{what}; checksum renewed", True


def change(document: Any, rng: np.random.Generator) -> str:
    """Change one place of a JSON document; the first levels are as likely as the many numbers below."""
    place, path = document, []
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[int(rng.integers(len(keys)))]
        path.append(str(key))
        below = place[key]
        if isinstance(below, (dict, list)) and below and rng.random() < 0.75:
            place = below
            continue
        return f"{'/'.join(path)[:80]} {_CHANGES[int(rng.integers(len(_CHANGES)))](place, key, rng)}"


def _dropped(place: Any, key: Any, rng: np.random.Generator) -> str:
    del place[key]
    return "dropped"


def _other_value(place: Any, key: Any, rng: np.random.Generator) -> str:
    place[key] = VALUES[int(rng.integers(len(VALUES)))]
    return f"is {place[key]!r}"


def _edited(place: Any, key: Any, rng: np.random.Generator) -> str:
    value = place[key]
    if isinstance(value, (int, float)):
        place[key] = type(value)(value * 2 + 1) if isinstance(value, int) else value * float(rng.choice([0.9, 1.1, -1]))
    elif isinstance(value, str):
        place[key] = value[:-1] + "x"
    elif isinstance(value, list) and value:
        value.reverse()
    elif isinstance(value, dict) and value:
        value["again"] = value.pop(next(iter(value)))
    else:
        place[key] = 1
    return "edited"


def _as_text(place: Any, key: Any, rng: np.random.Generator) -> str:
    place[key] = str(place[key])
    return "is text"


def _in_list(place: Any, key: Any, rng: np.random.Generator) -> str:
    place[key] = [place[key], place[key]]
    return "is a list of two"


_CHANGES: list[Callable[[Any, Any, np.random.Generator], str]] = [
    _dropped, _other_value, _edited, _edited, _as_text, _in_list
]  # fmt: skip


def _tensors(file: Path, rng: np.random.Generator) -> tuple[str, bool]:
    """The header, a number, or the text in it, of a safetensors file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    if rng.random() < 0.4 and body:
        start = 4 * int(rng.integers(len(body) // 4))
        body[start : start + 4] = np.float32(rng.choice([0, 1, -1, np.nan, 1e30])).tobytes()
        what = f"number {start // 4}"
    elif rng.random() < 0.5 and "training" in header.get("__metadata__", {}):
        document = json.loads(header["__metadata__"]["training"])
        what = "training/" + change(document, rng)
        header["__metadata__"]["training"] = json.dumps(document)
    else:
        what = "header/" + change(header, rng)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return what, False


def _onnx(file: Path, rng: np.random.Generator) -> tuple[str, bool]:
    model = onnx.load(file)
    file.write_bytes(damaged_fields(model, rng).SerializeToString())
    return "fields", False


_FIELDS: dict[str, Callable[[Path, np.random.Generator], tuple[str, bool]]] = {
    ".json": _json,
    ".safetensors": _tensors,
    ".onnx": _onnx,
}
