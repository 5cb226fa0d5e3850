"""Output of a run in progress: messages through the logger ``udi_trainer``, and a progress bar or progress lines."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger("udi_trainer")
INTERVAL = 30  # seconds between progress lines where there is no terminal for a bar


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if warning else record.getMessage()
        say(text, sys.stderr if warning else sys.stdout)


def say(text: str, file: TextIO | None) -> None:
    """Prints a line. If the output is gone, full, or lacks a character, the run goes on: its files matter."""
    if file is None:  # closed before Python started
        return
    try:
        tqdm.write(printable(text, file), file=file)
        file.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # or Python fails to flush the rest at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def printable(text: str, file: TextIO) -> str:
    """The text with escapes for what the file's encoding lacks."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def console(visible: bool = True) -> Iterator[None]:
    """Prints the messages of a run if ``visible``, and restores the logger afterwards."""
    handler, level, propagate = _Console(), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO if visible else logging.CRITICAL)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class Progress:
    """Progress over ``total`` steps: a bar on a terminal, else an occasional line; silent if messages are hidden."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done, self.note = label, total, 0, ""
        self.reported = time.monotonic()
        shown = any(isinstance(handler, _Console) for handler in log.handlers)
        text = printable(label, sys.stderr) if sys.stderr else label
        self.bar = tqdm(total=total, desc=text, leave=False, disable=None if shown and sys.stderr else True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, steps: int = 1) -> None:
        self.bar.update(steps)
        self.done += steps
        if self.bar.disable and time.monotonic() - self.reported > INTERVAL:
            self.reported = time.monotonic()
            log.info("%s: step %d of %d%s", self.label, self.done, self.total, self.note)

    def show(self, /, **values: float) -> None:
        """Sets the values shown with the progress."""
        self.bar.set_postfix({name: f"{x:.3f}" for name, x in values.items()})
        self.note = "".join(f", {name} {x:.3f}" for name, x in values.items())
