import os
import subprocess
import sys
import time

import pytest

from onnx_spdy.runtimes.load import PROC, ForeignLoad

needs_proc = pytest.mark.skipif(not PROC.is_dir(), reason="this system has no /proc")
SPIN = """
import os, sys, time
end = time.time() + 20
while time.time() < end and os.path.exists(sys.argv[1]):
    sum(range(1000))
"""


@needs_proc
def test_what_strangers_use_is_seen_and_what_we_use_is_not(tmp_path) -> None:
    alive = tmp_path / "alive"
    alive.touch()
    load = ForeignLoad()
    child = subprocess.Popen([sys.executable, "-c", SPIN, str(alive)])
    time.sleep(1.0)
    ours = load.cores()
    alive.unlink()
    child.wait()
    alive.touch()
    # A grandchild whose parent has ended belongs to nobody here.
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SPIN!r}, {str(alive)!r}])"
    subprocess.run([sys.executable, "-c", orphan], check=True)
    time.sleep(0.3)
    load.restart()
    time.sleep(1.0)
    strangers = load.cores()
    alive.unlink()
    assert ours is not None
    assert strangers is not None
    assert strangers > 0.2
    assert strangers > ours + 0.1


@needs_proc
def test_counting_starts_again() -> None:
    load = ForeignLoad()
    first = load.cores()
    load.restart()
    assert first is not None
    assert first >= 0
    assert os.getpid() > 0
