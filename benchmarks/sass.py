"""Reads the disassembly of machine code: resources, and instructions by pipe and loop.

Works for any cubin (Triton, NVRTC, nvcc), without a GPU or toolkit, because cuobjdump comes with Triton.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Registers, warps, blocks and shared memory of a multiprocessor; a warp's registers are allocated in steps of 256.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}

# Mnemonics by pipe. Those that begin with U use the uniform datapath, and all others the integer pipe, `alu`.
PIPES = {
    "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FFMA32I FMUL32I FADD32I HFMA2 HADD2 HMUL2 IMAD",
    "xu": "MUFU I2F F2I F2F FRND POPC BREV FLO",
    "memory": "LDG STG LDS STS LDC LDGSTS LDSM STSM LDL STL LD ST ATOM ATOMG ATOMS RED SHFL",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "control": "BRA EXIT BAR BSSY BSYNC NOP WARPSYNC CALL RET DEPBAR LDGDEPBAR YIELD BREAK ERRBAR MEMBAR CCTL",
}
PIPE = {mnemonic: pipe for pipe, mnemonics in PIPES.items() for mnemonic in mnemonics.split()}
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
USAGE = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass
class Segment:
    """Instructions of one thread that are executed equally often."""

    opcodes: list

    @property
    def pipes(self):
        return Counter(map(pipe, self.opcodes))

    @property
    def loaded(self):
        """Bytes loaded from global memory."""
        return sum(width(o) for o in self.opcodes if o.startswith(("LDG.", "LDGSTS.")))


@dataclass
class Kernel:
    name: str
    registers: int
    local: int
    shared: int
    straight: Segment  # outside of innermost loops
    loops: list  # innermost bodies, in the order of the code
    everything: Segment

    @property
    def spills(self):
        return sum(o.startswith(("LDL", "STL")) for o in self.everything.opcodes)

    @property
    def byte_stores(self):
        return sum(bool(re.match(r"ST[GS]?\.(\w+\.)*[US]8\b", o)) for o in self.everything.opcodes)

    def widest(self, prefix):
        """Bits of the widest global load (LDG) or store (STG)."""
        return max((8 * width(o) for o in self.everything.opcodes if o.startswith(prefix)), default=0)

    def resident(self, warps, arch, shared):
        """Resident warps per multiprocessor, for a launch with this many warps per block."""
        registers = -(-self.registers * 32 // 256) * 256
        blocks = min(BLOCKS, WARPS // warps, REGISTERS // registers // warps, SHARED[arch] // (shared + 1024))
        return blocks * warps


def pipe(opcode):
    mnemonic = opcode.split(".")[0]
    return PIPE.get(mnemonic) or ("uniform" if re.match(r"U[A-Z]|R2UR|S2UR|VOTEU", mnemonic) else "alu")


def width(opcode):
    """Bytes that a load or store moves per thread."""
    bits = re.search(r"\.(?:[US]?(8|16)|64|128|256)(?:\.|$)", opcode)
    return int(re.sub(r"\D", "", bits[0])) // 8 if bits else 4


def read(cubin):
    """{name: Kernel} of a cubin, given as bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = {name: list(map(int, numbers)) for name, *numbers in USAGE.findall(cuobjdump("-res-usage", file.name))}
        parts = re.split(r"Function : ", cuobjdump("-sass", file.name))[1:]
    kernels = {}
    for part in parts:
        name, _, code = part.partition("\n")
        registers, stack, shared, local = usage[name.strip()]
        kernels[name.strip()] = Kernel(name.strip(), registers, stack + local, shared, *segments(code))
    return kernels


def segments(code):
    """(straight, loops, everything) of a disassembly, up to its last unconditional EXIT."""
    lines = [(int(m[1], 16), m[2], m[3], m[4]) for m in LINE.finditer(code)]
    end = max(
        (i for i, (_, guard, opcode, _) in enumerate(lines) if opcode == "EXIT" and not guard), default=len(lines)
    )
    index = {address: i for i, (address, *_) in enumerate(lines)}
    loops = set()
    for i, (address, _, opcode, operands) in enumerate(lines[: end + 1]):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) <= address:
            loops.add((index[int(target[1], 16)], i))
    inner = [a for a in sorted(loops) if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    opcodes = [opcode for _, _, opcode, _ in lines]
    once = [o for i, o in enumerate(opcodes[: end + 1]) if not any(a <= i <= b for a, b in inner)]
    return Segment(once), [Segment(opcodes[a : b + 1]) for a, b in inner], Segment(opcodes)


def cuobjdump(flag, cubin):
    """Runs the cuobjdump that comes with Triton; for -sass it needs nvdisasm from the same folder."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["cuobjdump", flag, cubin], capture_output=True, text=True, check=True, env=environment
    ).stdout
