"""The machine that measures: which cores this process may use, and what its CPU can do."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil

CPUINFO = Path("/proc/cpuinfo")
CPU_FOLDERS = Path("/sys/devices/system/cpu")

# What a fast kernel may use, by the flag that the Linux kernel shows for it.
EXTENSIONS = {
    "vnni": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "bf16"),
    "amx": ("amx_tile",),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
}


def allowed_cpus() -> list[int]:
    """Logical CPUs that this process may run on (its affinity where the system has one), ascending."""
    if hasattr(psutil.Process, "cpu_affinity"):
        return sorted(psutil.Process().cpu_affinity())
    return list(range(psutil.cpu_count() or 1))


def core_cpus(folders: Path = CPU_FOLDERS) -> list[int]:
    """One allowed logical CPU for each allowed physical core, ascending.

    Where the system doesn't show its topology, every allowed logical CPU counts as a core.
    """
    first: dict[tuple[str, str], int] = {}
    for cpu in allowed_cpus():
        topology = folders / f"cpu{cpu}" / "topology"
        try:
            core = (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
        except OSError:
            core = ("logical", str(cpu))
        first.setdefault(core, cpu)
    return sorted(first.values())


def physical_cores() -> int:
    """Number of physical cores that this process may use."""
    allowed = len(core_cpus())
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The CPU's name, such as "AMD EPYC"."""
    fields = _cpuinfo(cpuinfo)
    return fields.get("model name") or platform.processor() or platform.machine()


def instruction_set(cpuinfo: Path = CPUINFO) -> str:
    """The CPU's widest vectors and its extensions for networks, such as "avx512_vnni_bf16"."""
    fields = _cpuinfo(cpuinfo)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    bases = (("avx512", "avx512f"), ("avx2", "avx2"), ("avx", "avx"), ("sve", "sve"), ("neon", "asimd"))
    base = next((name for name, flag in bases if flag in flags), platform.machine())
    return "_".join([base, *(name for name, any_of in EXTENSIONS.items() if flags.intersection(any_of))])


def fields() -> dict[str, Any]:
    """What an `Environment` says of this machine."""
    return {
        "cpu": cpu_model(),
        "instruction_set": instruction_set(),
        "cores": physical_cores(),
        "host": host_name(),
    }


def host_name() -> str:
    """The name of this machine."""
    return platform.node()


def _cpuinfo(path: Path) -> dict[str, str]:
    """The fields of the first processor; empty on systems without the file."""
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
