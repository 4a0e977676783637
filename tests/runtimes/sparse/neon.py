# ruff: noqa: T201
"""The sparse engine's NEON kernels, compiled for aarch64 and run by an emulator, against numpy.

`make test-neon` runs it: it needs the packages ziglang, unicorn and pyelftools. What it says of speed is nothing.
"""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import unicorn
from elftools.elf.elffile import ELFFile
from unicorn import arm64_const as arm

NATIVE = Path(__file__).parents[3] / "runtimes/sparse/native"
FLAGS = ("-target", "aarch64-linux-musl", "-static", "-std=c++17", "-O3", "-ffp-contract=fast",
         "-fno-sanitize=undefined", "-fno-threadsafe-statics", "-Wall", "-Wextra", "-Werror")  # fmt: skip
ENTRY = "_ZN4spdy12kernels_neonEv"
TOLERANCE = 1e-5  # relative to the largest element of the output
LANES, MOST_VECTORS, BLOCKS = 4, 24, (1, 2, 4)
STACK, STACK_BYTES, DATA, DATA_BYTES, RETURN = 0x7000_0000, 1 << 20, 0x5000_0000, 16 << 20, 0x6000_0000
TILE = struct.Struct("<QQQqQQqQqQqff?7x")  # as in kernels.h
STEP = struct.Struct("<i4xQff")
OPERATIONS = ("Add", "Mul", "Clamp", "Leaky", "HardSwish", "HardSigmoid", "Sigmoid", "Silu", "Gelu")


class Machine:
    """A processor with the kernels in its memory."""

    def __init__(self, program: Path) -> None:
        self._cpu = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        with program.open("rb") as file:
            elf = ELFFile(file)
            for segment in elf.iter_segments("PT_LOAD"):
                first = segment["p_vaddr"] & ~0xFFFF
                end = (segment["p_vaddr"] + segment["p_memsz"] + 0xFFFF) & ~0xFFFF
                for page in range(first, end, 0x1_0000):  # segments may share one
                    if not any(begin <= page <= last for begin, last, _ in self._cpu.mem_regions()):
                        self._cpu.mem_map(page, 0x1_0000)
                self._cpu.mem_write(segment["p_vaddr"], segment.data())
            symbol = elf.get_section_by_name(".symtab").get_symbol_by_name(ENTRY)[0]["st_value"]
        for start, size in ((STACK, STACK_BYTES), (DATA, DATA_BYTES), (RETURN, 0x1_0000)):
            self._cpu.mem_map(start, size)
        self._cpu.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point is on
        self._next = DATA
        table = bytes(self._cpu.mem_read(self.call(symbol), 632))
        name = bytes(self._cpu.mem_read(int.from_bytes(table[:8], "little"), 4))
        assert name == b"neon", name
        lanes, *self.widest = struct.unpack_from("<iiii", table, 8)
        assert lanes == LANES
        pointers = struct.unpack_from(f"<{3 * (MOST_VECTORS + 1)}Q", table, 24)
        self.tiles = np.array(pointers, np.uint64).reshape(3, -1)
        (self.map,) = struct.unpack_from("<Q", table, 624)

    def call(self, function: int, *arguments: int) -> int:
        """What a function returns."""
        for number, value in enumerate(arguments):
            self._cpu.reg_write(arm.UC_ARM64_REG_X0 + number, value)
        self._cpu.reg_write(arm.UC_ARM64_REG_SP, STACK + STACK_BYTES - 64)
        self._cpu.reg_write(arm.UC_ARM64_REG_LR, RETURN)
        self._cpu.emu_start(function, RETURN)
        return int(self._cpu.reg_read(arm.UC_ARM64_REG_X0))

    def clear(self) -> None:
        """Forget what was put into the memory."""
        self._next = DATA

    def put(self, content: np.ndarray | bytes) -> int:
        """The address of a copy of it."""
        data = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
        place = self._next
        self._cpu.mem_write(place, data)
        self._next = (place + len(data) + 64 + 15) & ~15
        return place

    def floats(self, place: int, count: int) -> np.ndarray:
        return np.frombuffer(bytes(self._cpu.mem_read(place, 4 * count)), np.float32)


def compiled(folder: Path) -> Path:
    main = folder / "main.cpp"
    main.write_text('#include "kernels.h"\nint main() { return spdy::kernels_neon() == nullptr; }\n')
    program = folder / "kernels"
    command = [sys.executable, "-m", "ziglang", "c++", *FLAGS, "-I", str(NATIVE), str(main)]
    subprocess.run([*command, str(NATIVE / "kernel_neon.cpp"), "-o", str(program)], check=True)
    return program


def valid_bits(rng: np.random.Generator, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of pixels, one for each, and the same in bytes with one more at the end."""
    bits = rng.random(pixels) < 0.8
    return bits, np.r_[np.packbits(bits, bitorder="little"), np.zeros(2, np.uint8)]


def compare_tile(machine: Machine, rng: np.random.Generator) -> float:
    block = int(rng.integers(3))
    outputs, vectors = BLOCKS[block], int(rng.integers(1, machine.widest[block] + 1))
    pixels, taps = vectors * LANES, int(rng.integers(0, 70))
    first = LANES * int(rng.integers(0, 5))  # pixel
    step = pixels + int(rng.integers(0, 9))
    source = rng.normal(size=400).astype(np.float32)
    offsets = rng.integers(0, len(source) - pixels, taps).astype(np.int32)
    values = rng.normal(size=(taps, outputs)).astype(np.float32)
    before, residual = rng.normal(size=(2, outputs, step)).astype(np.float32)
    bias = rng.normal(size=outputs).astype(np.float32)
    has_bias, has_residual, is_last = (bool(one) for one in rng.random(3) < 0.6)
    low, high = (-0.5, 1.5) if rng.random() < 0.5 else (-math.inf, math.inf)
    bits, packed = valid_bits(rng, first + pixels)
    wanted = np.tile(bias.astype(float)[:, None], pixels) if has_bias else before[:, :pixels].astype(float)
    for offset, own in zip(offsets, values.astype(float), strict=True):
        wanted = wanted + own[:, None] * source[offset : offset + pixels]
    if is_last:
        wanted = wanted + (residual[:, :pixels] if has_residual else 0.0)
        wanted = np.where(bits[first:], np.clip(wanted, low, high), 0.0)
    machine.clear()
    place = machine.put(before)
    arguments = TILE.pack(
        machine.put(source), machine.put(offsets), machine.put(values), taps, machine.put(bias) if has_bias else 0,
        place, step, machine.put(residual) if has_residual else 0, step, machine.put(packed), first, low, high, is_last,
    )  # fmt: skip
    machine.call(int(machine.tiles[block, vectors]), machine.put(arguments))
    found = machine.floats(place, outputs * step).reshape(outputs, step)
    np.testing.assert_array_equal(found[:, pixels:], before[:, pixels:])  # nothing beside it is written
    return float(np.abs(found[:, :pixels] - wanted).max() / max(1.0, np.abs(wanted).max()))


def apply(operation: str, x: np.ndarray, other: np.ndarray, low: float, high: float) -> np.ndarray:
    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    if operation in ("Add", "Mul"):
        return x + other if operation == "Add" else x * other
    if operation == "Clamp":
        return np.clip(x, low, high)
    if operation == "Leaky":
        return np.where(x < 0, low * x, x)
    if operation == "HardSwish":
        return x * np.clip(x / 6 + 0.5, 0, 1)
    if operation == "HardSigmoid":
        return np.clip(low * x + high, 0, 1)
    if operation == "Gelu":
        return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])
    return sigmoid(x) if operation == "Sigmoid" else x * sigmoid(x)


def compare_map(machine: Machine, rng: np.random.Generator) -> float:
    vectors, count = int(rng.integers(1, 20)), int(rng.integers(1, 4))
    pixels, first = vectors * LANES, LANES * int(rng.integers(0, 5))
    source, other = 3 * rng.normal(size=(2, pixels)).astype(np.float32)
    bits, packed = valid_bits(rng, first + pixels)
    wanted, steps = source.astype(float), b""
    machine.clear()
    beside = machine.put(other)
    for _ in range(count):
        operation = int(rng.integers(len(OPERATIONS)))
        low, high = np.sort(rng.random(2)).astype(np.float32).tolist()
        steps += STEP.pack(operation, beside, low, high)
        wanted = apply(OPERATIONS[operation], wanted, other, low, high)
    wanted = np.where(bits[first:], wanted, 0.0)
    target = machine.put(np.zeros(pixels, np.float32))
    machine.call(
        machine.map, machine.put(source), target, vectors, machine.put(packed), first, machine.put(steps), count
    )
    return float(np.abs(machine.floats(target, pixels) - wanted).max() / max(1.0, np.abs(wanted).max()))


if __name__ == "__main__":
    cases = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(compiled(Path(folder)))
    worst = {}
    for compare in (compare_tile, compare_map):
        worst[compare.__name__] = max(compare(machine, np.random.default_rng(seed)) for seed in range(cases))
    print(f"{cases} calls of each: largest difference " + ", ".join(f"{value:.2g}" for value in worst.values()))
    sys.exit(max(worst.values()) > TOLERANCE)
