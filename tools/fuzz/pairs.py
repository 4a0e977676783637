"""Two runs at once in one folder, with different arguments: one of them, or one after the other, never both mixed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from onnx_spdy.runtimes.atomic import WorkFolder
from onnx_spdy.tools.fuzz.child import Ended, Outcome, command, import_everything, start, wait
from onnx_spdy.tools.fuzz.setting import OUT, RUN, cleared, differing, make, results

VARIATIONS: tuple[tuple[str, ...], ...] = (
    (),
    ("--seed", "1"),
    ("--pruner", "magnitude"),
    ("--speedup", "1.3"),
    ("--speedup", "1.2,1.6"),
    ("--search", "dp"),
    ("--finetune", "none"),
    ("--batch", "32"),
    ("--pattern", "block4"),
    ("--pattern", "blockout4,unstructured"),
    ("--loss", "cross-entropy"),
    ("--search-samples", "16"),
    ("--data", "other.npz"),
)
IN_USE = "another command works in"


def trials(count: int, seed: int, first: int = 0, keep: Path | None = None) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of `count` pairs from number `first` on."""
    import_everything()
    with WorkFolder() as work:
        case = Path(work) / "case"
        for number in range(first, first + count):
            outcome = _trial(np.random.default_rng([seed, number]), case)
            yield number, cleared(outcome, case, number, keep)


def _trial(rng: np.random.Generator, case: Path) -> Outcome:
    calls = [(*RUN, *VARIATIONS[number]) for number in rng.permutation(len(VARIATIONS))[:2]]
    # Most begin nearly together; the others while the first one works, or when it is about to end.
    delay = float(rng.choice([0.0, 0.01, 0.1, 1.0, 2.0, 3.0]) * rng.uniform(0.5, 1.5))
    both = _together(_folder(case / "both"), calls, delay)
    first, second = (" ".join(call[len(RUN) :]) or "plain" for call in calls)
    what = f"{first} | {second}, {delay:.2f} s later"
    text = "".join(done.text for done in both)
    if troubles := [done.trouble for done in both if done.trouble]:
        return Outcome(troubles[0], "", text, what)
    waited = [number for number, done in enumerate(both) if done.code == 1 and IN_USE in done.err]
    if len(waited) == 2:
        return Outcome("both refused", "", text, what)
    if waited:
        orders, became = [[1 - waited[0]]], "one, the other was refused"
    else:
        orders, became = [[0, 1], [1, 0]], "one after the other"
    found = results(case / "both" / OUT)
    for order in orders:
        folder = _folder(case / f"order{order[0]}")
        codes = {number: _together(folder, [calls[number]], 0)[0].code for number in order}
        if not differing(results(folder / OUT), found) and all(codes[number] == both[number].code for number in codes):
            return Outcome(None, became, text, what)
    return Outcome("mixed", became, text, what)


def _folder(folder: Path) -> Path:
    make(folder)
    shutil.copyfile(make(folder / "other", seed=1) / "data.npz", folder / "other.npz")
    return folder


def _together(folder: Path, calls: list[tuple[str, ...]], delay: float) -> list[Ended]:
    begun = []
    for number, call in enumerate(calls):
        time.sleep(delay if number else 0)
        output = folder / f"printed{number}"
        begun.append((start(command(call, folder), output), output))
    return [wait(child, output) for child, output in begun]
