"""Builds the executables of the local cluster from `localcluster/go` and keeps them in the user's cache.

The cache is `${XDG_CACHE_HOME:-~/.cache}/moe-operator/bin/<digest>/`, with one file for every program and
one symbolic link for every other name of it. The digest covers all inputs: Go files, go.mod, go.sum, flags
and platform. It excludes the compiler's version, so that executables stay usable when Go is upgraded or
removed.

Standard library only: `python3 -m localcluster.build` runs before any virtual environment exists.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from localcluster import golang
from localcluster.compilation import Compilation, Program, Source
from localcluster.errors import BuildError
from localcluster.layout import cache_directory
from localcluster.progress import Progress, Reporter, Step, ignore

KUBERNETES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl")
CLUSTER = Source(
    directory=Path(__file__).parent / "go",
    programs=(
        Program("./kubernetes", (*KUBERNETES, "cri-descriptor")),
        Program("./otelcol", ("otelcol",)),
        Program("helm.sh/helm/v4/cmd/helm", ("helm",)),
        Program("github.com/fullstorydev/grpcurl/cmd/grpcurl", ("grpcurl",)),
    ),
)


def ensure(
    names: Sequence[str], progress: Progress = ignore, *, source: Source = CLUSTER, cache: Path | None = None
) -> dict[str, Path]:
    """Paths of executables, building first what the cache lacks.

    Without a cache, Kubernetes takes 5 to 8 minutes on 2 cores; with it, milliseconds. Of concurrent calls,
    one builds and the others wait for it.

    Args:
        names: the names of programs, such as `kubectl`.
        progress: told what happens.
        source: the Go module to build from.
        cache: instead of `cache_directory()`.

    Raises:
        BuildError: an unknown name, no compiler, or a failed compilation.
    """
    chosen = source.choose(names)
    root = cache or cache_directory()
    home = root / "bin" / source.digest()
    if _missing(home, chosen):
        home.mkdir(parents=True, exist_ok=True)
        with _only_one(home.with_suffix(".lock"), progress):
            missing = _missing(home, chosen)
            if missing:
                _build(source, missing, root, home, progress)
    return {name: home / name for name in names}


def _missing(home: Path, programs: Sequence[Program]) -> tuple[Program, ...]:
    return tuple(p for p in programs if not all((home / name).exists() for name in (p.file, *p.names)))


@contextlib.contextmanager
def _only_one(lock: Path, progress: Progress) -> Iterator[None]:
    """Holds a file lock, which the kernel releases with the process, so a killed build never blocks the next
    one.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(Step("waiting for another build of the same to finish"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(source: Source, programs: Sequence[Program], root: Path, home: Path, progress: Progress) -> None:
    """Builds next to the cache entry, then renames; the links come last and mark the entry as complete."""
    compiler = golang.find(source.needed_go(), root / "toolchain", lambda text: progress(Step(text)))
    for leftover in home.parent.glob(f"{home.name}.*.partial"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f"{home.name}.", suffix=".partial") as scratch:
        Compilation(compiler, source, tuple(programs)).run(Path(scratch), progress)
        for program in programs:
            (Path(scratch) / program.file).replace(home / program.file)
    for program in programs:
        for name in set(program.names) - {program.file}:
            with contextlib.suppress(FileExistsError):
                (home / name).symlink_to(program.file)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python3 -m localcluster.build [NAME ...]`: builds, and prints a line `NAME PATH` for each."""
    known = [name for program in CLUSTER.programs for name in program.names]
    parser = argparse.ArgumentParser("python3 -m localcluster.build", description="Build the local cluster.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}; default: all")
    names: list[str] = parser.parse_args(arguments).names or known
    try:
        with Reporter(sys.stderr) as reporter:
            paths = ensure(names, reporter.show)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is compiled so far stays in Go's cache", file=sys.stderr)
        return 130
    for name, path in paths.items():
        print(name, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
