"""Bars on a terminal, lines elsewhere, neither where messages are not shown."""

import io
import logging
import sys

from udi_trainer import console
from udi_trainer.console import Progress, log


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work():
    with Progress("stage", 3) as progress:
        progress.update()
        progress.show(val_acc=0.5, self=0.25)  # values may have any name: modalities have
        progress.update(2)


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "INTERVAL", 0)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.console():
        work()
    assert "stage" in terminal.getvalue() and "val_acc=0.500" in terminal.getvalue()
    assert "step" not in capsys.readouterr().out


def test_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(console, "INTERVAL", 0)
    with console.console():
        work()
    out, err = capsys.readouterr()
    assert out.splitlines() == ["stage: step 1 of 3", "stage: step 3 of 3, val_acc 0.500, self 0.250"] and not err


def test_nothing_where_messages_are_not_shown(monkeypatch, capsys):
    """No bar either where the messages go to handlers of one's own."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    log.setLevel(logging.INFO)
    try:
        work()
    finally:
        log.setLevel(logging.NOTSET)
    assert terminal.getvalue() == "" and capsys.readouterr().out == ""


def test_warnings_go_to_the_error_stream(capsys):
    with console.console():
        log.info("a message")
        log.warning("beware")
    assert capsys.readouterr() == ("a message\n", "warning: beware\n")
