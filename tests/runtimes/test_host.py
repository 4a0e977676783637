from __future__ import annotations

import os

import pytest

from onnx_spdy.runtimes import allowed_cpus, host, physical_cores

CPUINFO = """processor\t: 0
model name\t: Test CPU 9000
flags\t\t: fpu sse4_2 avx avx2 {flags}

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "avx2"),
        ("avx_vnni", "avx2_vnni"),
        ("avx512f avx512_vnni avx512_bf16 amx_tile", "avx512_vnni_bf16_amx"),
    ],
)
def test_the_cpu_is_named_with_what_it_can(tmp_path, flags, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO.format(flags=flags))
    assert host.cpu_model(cpuinfo) == "Test CPU 9000"
    assert host.instruction_set(cpuinfo) == expected


def test_without_cpuinfo_the_machine_is_named(tmp_path):
    assert host.instruction_set(tmp_path / "none")
    assert host.cpu_model(tmp_path / "none")


def test_hyperthreads_count_once_and_forbidden_cores_not_at_all(tmp_path, monkeypatch):
    for cpu, core in enumerate([0, 1, 2, 0, 1, 2]):  # 3 cores of 2 threads each
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{core}\n")
        (folder / "physical_package_id").write_text("0\n")
    monkeypatch.setattr(host, "allowed_cpus", lambda: [1, 3, 4])
    assert host.core_cpus(tmp_path) == [1, 3]
    assert host.core_cpus(tmp_path / "none") == [1, 3, 4]


def test_this_process_may_run_where_the_system_says():
    if hasattr(os, "sched_getaffinity"):
        assert allowed_cpus() == sorted(os.sched_getaffinity(0))
    assert 1 <= physical_cores() <= len(allowed_cpus())
