#!/usr/bin/env bash
# An optimizer made after init_process_group keeps the process group, and gloo's threads, for good.
#
# Version:   torch 2.13.0, CPU, Linux.
# Input:     init_process_group("gloo"), one all_reduce, destroy_process_group(), with the process's first optimizer made
#            before the first of these, or after it.
# Behaviour: the first optimizer imports torch._dynamo, and that torch.distributed.nn.functional. Its functions have
#            `group=group.WORLD` as a default argument, evaluated at import: None before init_process_group, the group
#            itself after it. destroy_process_group() drops torch's other references, this one stays, and gloo's threads
#            run on. A thread that frees a tensor while Python shuts down ends the process: about one run in fifty of two
#            processes under load printed "terminate called without an active exception" and died by SIGABRT, after all
#            work was done and the group destroyed.
# Expected:  destroy_process_group() ends the threads, whatever was imported when.
# Here:      docs/scale.md makes the optimizer first; the trainer ends its processes by os._exit under torchrun.
#
# Output seen:
#
#     torch 2.13.0+cpu
#     optimizer first: 0 threads of gloo after destroy_process_group, default group None
#     group first:     3 threads of gloo after destroy_process_group, default group ProcessGroup
#     as described
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def optimizer():
    torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)


if sys.argv[1] == "optimizer":
    optimizer()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if sys.argv[1] == "group":
    optimizer()
dist.all_reduce(torch.ones(3))
dist.destroy_process_group()

threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
count = sum("gloo" in name for name in threads)
default = type(sys.modules["torch.distributed.nn.functional"].all_reduce.__defaults__[1]).__name__.removesuffix("Type")
print(f"{count} threads of gloo after destroy_process_group, default group {default}", flush=True)
os._exit(0)  # leaves out the shutdown in which a thread may abort
PYTHON
python="$folder/venv/bin/python"
echo "torch $("$python" -c 'import torch; print(torch.__version__)')"
first=$("$python" "$folder/show.py" optimizer)
last=$("$python" "$folder/show.py" group)
echo "optimizer first: $first"
echo "group first:     $last"
if [[ $first == "0 threads"*None && $last == "3 threads"*ProcessGroup ]]; then
    echo "as described"
else
    echo "THE BEHAVIOUR HAS CHANGED"
    exit 1
fi
