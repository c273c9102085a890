"""Compiles the CPU kernels once for each instruction set into one shared object.

It needs neither torch nor the rest of the package: the build hook of the wheel loads this file alone.
docs/adr/0008 explains why the result has two places.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
PACKAGED = Path(__file__).parent / "lib"  # where a wheel and an editable install have the library
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti")
# Sums keep the order and the roundings that the source has: results must not depend on the batch.
FLOATS = ("-ffp-contract=off",)
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
VARIANTS = {
    "avx2": _AVX2,
    "avx-vnni": (*_AVX2, "-mavxvnni"),
    "avx512": _AVX512,
    "avx512-vnni": (*_AVX512, "-mavx512vnni"),
    "avx512-bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"),
}


class BuildError(Exception):
    """The kernels are not available here; the message says why."""


def library_name() -> str:
    """File name that changes with sources and flags, so a stale library is never loaded."""
    digest = hashlib.sha256(repr((FLAGS, FLOATS, VARIANTS)).encode())
    for source in sorted(NATIVE.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return f"moe_cpu_{digest.hexdigest()[:16]}.so"


def cache_directory() -> Path:
    """The user's cache directory (XDG)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "moe-operator" / "kernels"


def find_or_build() -> Path:
    """The library: from the source folder, from the user's cache, or compiled into it. Raises BuildError."""
    for directory in (PACKAGED, cache_directory()):
        path = directory / library_name()
        if path.exists():
            return path
    return build(cache_directory())


def install() -> Path:
    """Copies the library to the source folder of an editable install, where pods that mount it find it, too.

    Pods do not see the user's cache: each would compile at every start. Raises BuildError.
    """
    found = find_or_build()
    if found.parent == PACKAGED:
        return found
    try:
        PACKAGED.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PACKAGED) as work:
            return Path(shutil.copy2(found, work)).replace(PACKAGED / found.name)
    except OSError as error:
        raise BuildError(f"the CPU kernels could not be written to {PACKAGED}: {error.strerror}") from error


def build(directory: Path) -> Path:
    """Compiles into `directory`, in 20 seconds of CPU time; other processes see the complete file or none.

    Raises BuildError if this is not Linux on x86-64, if there is no C++ compiler, or if it fails.
    """
    compiler = _compiler()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as work:
            made = _compile(compiler, Path(work))
            return made.replace(directory / library_name())
    except OSError as error:
        raise BuildError(f"the CPU kernels could not be written to {directory}: {error.strerror}") from error


def _compiler() -> str:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        here = f"{platform.system()} on {platform.machine()}"
        raise BuildError(f"there are CPU kernels for Linux on x86-64 only, this is {here}")
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler was found (looked for $CXX, g++, clang++ and c++)")


def _compile(compiler: str, work: Path) -> Path:
    units = [
        (
            "variant.cpp",
            name,
            (*flags, f"-DVARIANT=variant_{name.replace('-', '_')}", f'-DVARIANT_NAME="{name}"'),
        )
        for name, flags in VARIANTS.items()
    ]
    units += [(f"{name}.cpp", name, ()) for name in ("engine", "pool", "pack_sparse14")]

    def one(unit: tuple[str, str, tuple[str, ...]]) -> str:
        source, name, flags = unit
        target = str(work / f"{name}.o")
        _run([compiler, *FLAGS, *FLOATS, *flags, "-c", str(NATIVE / source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, units))
    made = work / "library.so"
    _run([compiler, "-shared", "-o", str(made), *objects, "-lpthread"])
    return made


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or ["no message"]
        raise BuildError(f"{command[0]} could not compile the CPU kernels: {lines[0]}")
