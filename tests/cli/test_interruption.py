"""How long an interrupted run still waits for MLflow."""

from __future__ import annotations

import os
import signal
import time

import pytest

from grpo_fed.cli.errors import patience_after, time_interruption


@pytest.mark.parametrize(("seconds", "patience"), [(0.0, 2.0), (0.5, 2.0), (2.25, 0.75), (3.0, 0.0), (60.0, 0.0)])
def test_mlflow_has_what_is_left_of_three_seconds(seconds: float, patience: float):
    assert patience_after(seconds) == patience


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_timed_from_its_signal_on(number: signal.Signals):
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        with time_interruption() as seconds:
            assert seconds() == 0.0
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
            time.sleep(0.02)
            assert seconds() >= 0.02
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
