"""kill -9 at random points of a run, again and again: every resume must end with the uninterrupted run's figures.

    python tests/trainer/kill_points.py --points 200 --processes 1
    python tests/trainer/kill_points.py --points 200 --changed

Half of the kills come at a random time, half inside a random write: with half of the file written, before the file
takes its name, after it has. Of several processes one is killed, or all. No checkpoint may be unreadable after a kill.
Processes are forked from this one, so that a point costs a second and not five. --changed trains on a manifest, and
after half of the kills changes it first: that resume must be refused, and leave the run as it was.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import sklearn.datasets
import sklearn.model_selection  # noqa: F401  here, and not in every forked process

from udi_trainer import run_folder
from udi_trainer.command import main as train

OPTIONS = "--epochs 3 --batch-size 128 --controller dynamic --align-every 3 --baselines none --device cpu".split()


def write_manifest(path, samples=400):
    """Two tables of numbers, and a label that both tell a little of."""
    draw, rows = random.Random(0), ["label,a,b,c,d"]
    for i in range(samples):
        rows.append(f"{i % 3}," + ",".join(f"{draw.gauss(i % 3, 1):.4f}" for _ in "abcd"))
    path.write_text("\n".join(rows) + "\n")


def check_refusal(folder, manifest, log, draw):
    """Resumes with another manifest: a row less, two labels exchanged, or another number."""
    original = manifest.read_text()
    rows = original.splitlines()
    i, j = draw.sample(range(1, len(rows)), 2)
    if (kind := draw.choice(("row", "labels", "number"))) == "row":
        del rows[i]
    elif kind == "number":
        rows[i] = rows[i].rpartition(",")[0] + ",9.5"
    else:
        j = next(k for k in range(1, len(rows)) if rows[k][0] != rows[i][0])
        rows[i], rows[j] = rows[j][0] + rows[i][1:], rows[i][0] + rows[j][1:]
    manifest.write_text("\n".join(rows) + "\n")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    told = log.stat().st_size
    (status,) = wait(begin(["--resume", str(folder)], 1, log)).values()
    said = log.read_text()[told:]
    assert os.waitstatus_to_exitcode(status) == 2 and "the data is not that of this run" in said, said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    manifest.write_text(original)


def begin(arguments, processes, log, doom=None):
    """Processes that train; ``doom`` (rank, write, place) ends one inside one of its writes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        with open(log, "a") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        try:
            if processes > 1:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ |= {name: str(x) for name, x in world.items()}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            if doom and doom[0] == rank:
                die_in_write(*doom[1:])
            code = train(arguments)
        finally:
            os._exit(code)
    return children


def die_in_write(number, place):
    fsync, replace, calls = os.fsync, os.replace, []

    def synced(handle):
        calls.append(1)
        if len(calls) == number and place == "half":
            os.truncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    def replaced(*paths):
        if len(calls) == number and place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    run_folder.os.fsync, run_folder.os.replace = synced, replaced


def wait(children, until=float("inf")):
    """Exit statuses by process, of those that ended in time."""
    ended = {}
    while len(ended) < len(children) and time.monotonic() < until:
        for child in children:
            if child not in ended:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    ended[child] = status
        time.sleep(0.002)
    return ended


def end(children, ended):
    for child in children:
        if child not in ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def figures(folder):
    """All but times, in an order that does not depend on who logged first."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["phase"], str(row["modality"]), row["epoch"]))
    return [
        {k: v for k, v in x.items() if k != "seconds"}
        for x in (json.loads((folder / "metrics.json").read_text()), *rows)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--changed", action="store_true", help="change the data after half of the kills")
    options = parser.parse_args()
    draw, work = random.Random(options.seed), Path(tempfile.mkdtemp())
    log, manifest = work / "log", work / "m.csv"
    argv = [*OPTIONS]
    if options.changed:
        write_manifest(manifest)
        argv += [
            "--dataset",
            "manifest",
            "--manifest",
            str(manifest),
            "--tables",
            "ab=a+b,cd=c+d",
            "--align-every",
            "1",
        ]

    for name in ("warm", "whole"):  # the first builds what is built once
        began = time.monotonic()
        children = begin([*argv, "--out", str(work / name)], options.processes, log)
        assert not any(wait(children).values()), log.read_text()
    length, wanted = time.monotonic() - began, figures(work / "whole")
    assert figures(work / "warm") == wanted, "two uninterrupted runs differ"
    writes = 3 * 3 + 3 + 4  # roughly: stages times epochs, what is made at the end, logs taken up

    points = runs = joining = refused = 0
    where, folder = dict.fromkeys(("time", "half", "before", "after", "all", "one"), 0), work / "run"
    while True:
        place = "end" if points >= options.points else draw.choice(("time", "time", "time", "half", "before", "after"))
        rank = draw.randrange(options.processes)
        doom = None if place in ("time", "end") else (0, draw.randint(1, writes), place)  # the first one writes
        arguments = ["--resume", str(folder)] if (folder / "config.json").exists() else [*argv, "--out", str(folder)]
        if "--out" in arguments:
            shutil.rmtree(folder, ignore_errors=True)
        told = log.stat().st_size
        children = begin(arguments, options.processes, log, doom)
        limit = time.monotonic() + draw.uniform(0, length) if place == "time" else float("inf")
        ended = wait(children, limit) if place != "end" and not doom else {}
        if place == "time" and len(ended) < len(children):
            everyone = draw.random() < 0.5
            where["all" if everyone else "one"] += 1
            for child in children if everyone else [children[rank]]:
                if child not in ended:  # no longer ours
                    os.kill(child, signal.SIGKILL)
        ended |= wait([c for c in children if c not in ended], time.monotonic() + 60)
        if len(ended) < len(children):  # torch waits half an hour for one that has yet to join; torchrun ends it
            assert "udi on" not in log.read_text()[told:], f"a process outlives the others: {log}"
            joining += 1
            end(children, ended)
        if any(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL for status in ended.values()):
            points += 1
            where[place] += 1
            for path in folder.glob("checkpoints/*.pt"):
                run_folder.load_tensors(path, "unreadable after a kill")
            if options.changed and (folder / "config.json").exists() and draw.random() < 0.5:
                check_refusal(folder, manifest, log, draw)
                refused += 1
        else:
            assert not any(ended.values()), log.read_text()[-2000:]
            assert figures(folder) == wanted, f"{folder} differs from {work / 'whole'}"
            runs += 1
            if points >= options.points:
                break
            shutil.rmtree(folder)
        if points and points % 20 == 0:
            print(f"{points} kills, {runs} runs ended with the uninterrupted figures", file=sys.stderr)
    print(f"{points} kills ({where}), {runs} runs ended with the uninterrupted figures, 0 unreadable checkpoints")
    if options.changed:
        print(f"{refused} times other data was refused, and the run left as it was")
    if joining:
        print(f"{joining} times a process waited for a killed one to join, and was ended as torchrun does")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
