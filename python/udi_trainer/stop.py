"""Stops a run early without losing work."""

import contextlib
import signal
from collections.abc import Iterator

from . import distributed

CHECK_EVERY = 8  # steps between two checks of distributed processes


class Stopped(KeyboardInterrupt):
    """The run was stopped between two training steps."""


class Stop:
    """A request to stop. Training honours it between two steps and saves; elsewhere it takes effect at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._deferred = False

    def request(self, number: int, frame: object = None) -> None:
        """A signal handler. A second signal takes effect at once."""
        repeated, self.signal_number = self.signal_number is not None, number
        if repeated or not self._deferred:
            raise KeyboardInterrupt

    def check(self, step: int | None = None) -> None:
        """Raises :class:`Stopped` if requested; distributed processes only agree on it every few steps of an epoch."""
        if distributed.world() > 1 and (step is None or step % CHECK_EVERY):
            return
        if distributed.any_process(self.signal_number is not None):
            raise Stopped

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In this context a first signal only takes effect at the next :meth:`check`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handles SIGINT, SIGTERM (sent by schedulers) and SIGHUP (terminal closed) unless they are already ignored."""
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self.request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
