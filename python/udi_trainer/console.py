"""What a run tells while it works: messages by the logger ``udi_trainer``, and a bar or lines of progress."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

log = logging.getLogger("udi_trainer")
SILENCE = 30  # seconds after which a line tells how far it is, where there is no terminal for a bar


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if warning else record.getMessage()
        file = sys.stderr if warning else sys.stdout
        try:
            tqdm.write(text, file=file)
            file.flush()
        except BrokenPipeError:
            raise
        except OSError:  # the terminal is gone; what is written to files still counts
            pass


@contextlib.contextmanager
def console(speaks: bool = True) -> Iterator[None]:
    """Prints the messages of a run, or keeps quiet; leaves the logger as it was."""
    handler, level, propagate = _Console(), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO if speaks else logging.CRITICAL)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class Progress:
    """Of so many steps: a bar on a terminal, elsewhere a line now and then; nothing where messages are not shown."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done, self.note = label, total, 0, ""
        self.spoke = time.monotonic()
        shown = any(isinstance(handler, _Console) for handler in log.handlers)
        self.bar = tqdm(total=total, desc=label, leave=False, disable=None if shown else True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, steps: int = 1) -> None:
        self.bar.update(steps)
        self.done += steps
        if self.bar.disable and time.monotonic() - self.spoke > SILENCE:
            self.spoke = time.monotonic()
            log.info("%s: step %d of %d%s", self.label, self.done, self.total, self.note)

    def show(self, /, **values: float) -> None:
        """Values that stand beside it from now on."""
        self.bar.set_postfix({name: f"{x:.3f}" for name, x in values.items()})
        self.note = "".join(f", {name} {x:.3f}" for name, x in values.items())
