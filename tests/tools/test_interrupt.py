import os
import signal

import pytest

from onnx_spdy.tools.interrupt import Interrupt


def test_the_first_ctrl_c_asks_to_stop_and_the_second_one_stops(capsys: pytest.CaptureFixture[str]) -> None:
    interrupt = Interrupt()
    with interrupt() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        assert "Ctrl-C again" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_who_asked_to_stop_one_search_asked_to_stop_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    interrupt = Interrupt()
    with interrupt():
        os.kill(os.getpid(), signal.SIGINT)
    with interrupt() as asked:
        assert asked()


def test_elsewhere_ctrl_c_does_what_it_did() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt()():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
