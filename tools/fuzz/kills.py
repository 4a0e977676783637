"""A run that is killed at random moments and called again ends with the same bits as one that wasn't."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from onnx_spdy.pipeline.search import state
from onnx_spdy.runtimes.atomic import UNFINISHED, WORK, WorkFolder
from onnx_spdy.tools.fuzz.child import Ended, Outcome, command, import_everything, start, wait
from onnx_spdy.tools.fuzz.setting import OUT, RUN, cleared, differing, make, results

CALL = (*RUN, "--pruner", "magnitude")
KILLED, ENDED_BEFORE = "killed, same bits at the end", "had ended before, same bits"


def trials(count: int, seed: int, first: int = 0, keep: Path | None = None) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of `count` runs from number `first` on, each killed once or several times and called again."""
    import_everything()
    with WorkFolder() as work:
        sound, case = make(Path(work) / "sound"), Path(work) / "case"
        began = time.monotonic()
        done = wait(start(_run(sound), sound / "printed"), sound / "printed")
        seconds = time.monotonic() - began
        if done.code != 0:
            raise RuntimeError(done.text)
        expected = results(sound / OUT)
        for number in range(first, first + count):
            make(case)
            outcome = _trial(np.random.default_rng([seed, number]), case, seconds, expected)
            yield number, cleared(outcome, case, number, keep)


def _run(folder: Path) -> Callable[[], int]:
    """The call; it keeps what a search knows at once, not after some seconds, so that there is something to go on."""
    work = command(CALL, folder)

    def often() -> int:
        state.SAVE_SECONDS = 0.0
        return work()

    return often


def _trial(rng: np.random.Generator, case: Path, seconds: float, expected: dict) -> Outcome:
    kills = 0
    moments: list[float] = []
    while not moments or (rng.random() < 0.3 and len(moments) < 4):
        moments.append(float(rng.uniform(0, seconds)))
        kills += killed(case, moments[-1])
    done = wait(start(_run(case), case / "printed"), case / "printed")
    became = KILLED if kills else ENDED_BEFORE
    what = "killed after " + ", ".join(f"{moment:.2f} s" for moment in moments)
    return Outcome(trouble_of(done, case, expected), became, done.text, what, done.seconds, done.memory_bytes)


def killed(case: Path, moment: float) -> bool:
    """Start the run and kill it after so many seconds. Whether it still ran then."""
    child = start(_run(case), case / "printed")
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    return wait(child, case / "printed").code == -signal.SIGKILL


def trouble_of(done: Ended, case: Path, expected: dict) -> str | None:
    """What is not as it should be after the last call."""
    if done.trouble or done.code != 0:
        return done.trouble or done.became
    if different := differing(expected, results(case / OUT)):
        return f"other bits in {', '.join(different)}"
    left = [path.name for path in case.rglob(f"*{UNFINISHED}")]
    own = f"{WORK}{os.getpid()}-"
    left += [one.name for one in Path(tempfile.gettempdir()).glob(f"{WORK}*") if _is_left(one) and own not in one.name]
    return f"left {', '.join(left)}" if left else None


def _is_left(folder: Path) -> bool:
    """Whether its process is gone."""
    number = folder.name.removeprefix(WORK).split("-")[0]
    return number.isdigit() and not Path(f"/proc/{number}").exists()
