"""Ending a run early, with nothing lost."""

import contextlib
import signal
from collections.abc import Iterator

from . import distributed

AGREE = 8  # steps after which processes that train together ask each other


class Stopped(KeyboardInterrupt):
    """The run ends, between two steps of its training."""


class Stop:
    """A wish to end the run. A training hears it between two steps and keeps what it has; elsewhere it is at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._deferred = False

    def request(self, number: int, frame: object = None) -> None:
        """The handler of a signal; the second one does not wait."""
        again, self.signal_number = self.signal_number is not None, number
        if again or not self._deferred:
            raise KeyboardInterrupt

    def check(self, step: int | None = None) -> None:
        """``step``: of the epoch. Processes that train together stop after the same one, so they ask each other."""
        if distributed.world() > 1 and (step is None or step % AGREE):
            return
        if distributed.any_process(self.signal_number is not None):
            raise Stopped

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, :meth:`check` alone raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Ctrl-C, the end of the terminal, and what a scheduler sends before it kills; those not ignored already."""
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
