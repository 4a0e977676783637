"""Compiles native/ into the package: by the compiler in $CXX, or else by the one of the `ziglang` package."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = Path(__file__).resolve().parent
LIBRARY = "libonnxruntime_ep_spdy.so"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-sanitize=undefined",
    *WARNINGS,
)
# The file of each instruction set is compiled for it; all others run on every machine.
OWN_FLAGS = {
    "kernel_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "kernel_avx2": ["-mavx2", "-mfma"],
}


def compiler() -> list[str]:
    """The command of the compiler, without files and flags."""
    return shlex.split(os.environ["CXX"]) if os.environ.get("CXX") else [sys.executable, "-m", "ziglang", "c++"]


def compile_library(target: Path, objects: Path, version: str) -> None:
    """Compile every file of native/ and link them to `target`."""
    objects.mkdir(parents=True, exist_ok=True)
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = [*FLAGS, f'-DSPDY_VERSION="{version}"', *shlex.split(os.environ.get("CXXFLAGS", ""))]

    def compiled(source: Path) -> str:
        own = OWN_FLAGS.get(source.stem, []) if is_x86 else []
        place = str(objects / f"{source.stem}.o")
        subprocess.run([*compiler(), *flags, *own, "-c", str(source), "-o", place], check=True)
        return place

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        places = list(pool.map(compiled, sorted((FOLDER / "native").glob("*.cpp"))))
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*compiler(), *flags, "-shared", "-s", *places, "-o", str(target)], check=True)


class Build(build_py):
    def run(self) -> None:
        super().run()
        package = "onnxruntime_ep_spdy"
        folder = FOLDER / package if self.editable_mode else Path(self.build_lib) / package
        compile_library(folder / LIBRARY, Path(self.build_lib).parent / "objects", self.distribution.get_version())


class Wheel(bdist_wheel):
    """A wheel for this platform and every Python: the library isn't linked with it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


# Nothing is left beside the sources.
ELSEWHERE = {"build": {"build_base": tempfile.mkdtemp()}}
setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel}, distclass=WithLibrary, options=ELSEWHERE)
