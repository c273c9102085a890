"""One Go module, the programs in it, and one run of `go build` over them.

Standard library only: it runs before any virtual environment exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from localcluster import golang
from localcluster.errors import BuildError
from localcluster.progress import Progress, Step

FLAGS = ("-trimpath", "-buildvcs=false", "-mod=readonly", "-gcflags=all=-dwarf=false")
"""The last leaves out debug information, which the linker would drop: 9 % less compiling, 20 % less disk."""
ERROR_LINES = 20
"""How much of the compiler's output an error contains: a failed build prints its reason last."""


@dataclass(frozen=True)
class Program:
    """One executable: the Go package it is built from and the names it is called by."""

    package: str
    names: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name that `go build` gives it."""
        return self.package.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Source:
    """A Go module, the programs in it, and the build tags that select files."""

    directory: Path
    programs: tuple[Program, ...]
    tags: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of `go build`, without those of the linker."""
        return (*FLAGS, "-tags", ",".join(self.tags)) if self.tags else FLAGS

    def choose(self, names: Sequence[str]) -> tuple[Program, ...]:
        """The programs with these names.

        Raises:
            BuildError: a name that no program has.
        """
        known = {name: program for program in self.programs for name in program.names}
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise BuildError(f"no program is called {', '.join(unknown)}; there are {', '.join(known)}")
        return tuple(dict.fromkeys(known[name] for name in names))

    def linker_flags(self) -> str:
        """Leaves out symbol tables (a third of the size) and stamps go.mod's version of Kubernetes.

        Without it, kubectl and the API server have the version v0.0.0-master and refuse each other.
        """
        go_mod = self._go_mod().read_text(encoding="utf-8")
        found = re.search(r"k8s\.io/kubernetes (v(\d+)\.(\d+)\.\d+)", go_mod)
        if found is None:
            return "-s -w"
        stamp = {"gitVersion": found[1], "gitMajor": found[2], "gitMinor": found[3]}
        packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
        settings = [f"-X {package}.{key}={value}" for package in packages for key, value in stamp.items()]
        return " ".join(["-s -w", *settings])

    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any input of the build."""
        settings = (self.flags, self.linker_flags(), platform.system(), platform.machine())
        state = hashlib.sha256(repr(settings).encode())
        for path in sorted(self._inputs()):
            content = path.read_bytes()
            state.update(f"{path.relative_to(self.directory)} {len(content)}\n".encode())
            state.update(content)
        return state.hexdigest()[:16]

    def needed_go(self) -> golang.Version:
        """The oldest Go that compiles it."""
        return golang.required_version(self._go_mod())

    def _go_mod(self) -> Path:
        return self.directory / "go.mod"

    def _inputs(self) -> Iterator[Path]:
        yield from self.directory.rglob("*.go")
        yield from (path for path in (self._go_mod(), self.directory / "go.sum") if path.exists())


@dataclass(frozen=True)
class Compilation:
    """One run of `go build`, with its progress told package by package."""

    compiler: Path
    source: Source
    programs: tuple[Program, ...]
    clock: Callable[[], float] = time.monotonic

    def run(self, output: Path, progress: Progress) -> None:
        """Writes the executables into a directory.

        Raises:
            BuildError: with the end of the compiler's output.
        """
        start = self.clock()
        flags = (*self.source.flags, "-ldflags", self.source.linker_flags())
        packages = [program.package for program in self.programs]
        # Also fetches the modules. Only stale packages are compiled, and `-v` prints each of them once.
        template = "{{if .Stale}}{{.ImportPath}}{{end}}"
        list_stale = ["list", "-deps", "-f", template, *flags, *packages]
        stale = set(self._go(list_stale, self._fetched(progress, start)))
        build = ["build", "-v", *flags, "-o", f"{output}/", *packages]
        self._go(build, self._compiled(stale, progress, start))
        progress(Step(f"built {self._files()}", elapsed_s=self.clock() - start))

    def _fetched(self, progress: Progress, start: float) -> Callable[[str], None]:
        seen: list[str] = []

        def line(text: str) -> None:
            if text.startswith("go: downloading "):
                seen.append(text)
                progress(Step("fetching Go modules", len(seen), None, self.clock() - start))

        progress(Step("listing Go packages"))
        return line

    def _compiled(self, stale: set[str], progress: Progress, start: float) -> Callable[[str], None]:
        seen: set[str] = set()

        def line(text: str) -> None:
            if text in stale and text not in seen:
                seen.add(text)
                progress(Step(f"compiling {self._files()}", len(seen), len(stale), self.clock() - start))

        return line

    def _go(self, arguments: Sequence[str], on_error_line: Callable[[str], None]) -> list[str]:
        """Words of standard output; lines of standard error are handed on as they come."""
        tail: deque[str] = deque(maxlen=ERROR_LINES)
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as output,
            self._process(arguments, output) as process,
        ):
            for text in process.stderr or ():
                tail.append(text.rstrip("\n"))
                on_error_line(text.rstrip("\n"))
            if process.wait() != 0:
                raise self._failure(arguments[0], list(tail))
            output.seek(0)
            return output.read().split()

    @contextlib.contextmanager
    def _process(self, arguments: Sequence[str], output: IO[str]) -> Iterator[subprocess.Popen[str]]:
        """A running `go`, which is stopped when its reader fails or is interrupted."""
        with subprocess.Popen(
            [self.compiler, *arguments],
            cwd=self.source.directory,
            env=_environment(),
            stdout=output,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        ) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)  # on which it removes its temporary files

    def _files(self) -> str:
        return ", ".join(program.file for program in self.programs)

    def _failure(self, verb: str, tail: Sequence[str]) -> BuildError:
        return BuildError(
            f"`go {verb}` failed for {self._files()} in {self.source.directory}. It needs a Go module proxy,"
            f" 4 GB of memory and 6 GB of disk, {golang.OTHERWISE}. It said at the end:\n" + "\n".join(tail)
        )


def _environment() -> dict[str, str]:
    """The user's, so that proxies and caches stay theirs, less what would build for another platform.

    GOGC lets the compiler's own heap grow before it is collected: a fifth less CPU time (92 s to 73 s for the
    collector), and the peak of memory, linking Kubernetes, stays at 1.9 GB.
    """
    unwanted = {"GOOS", "GOARCH", "GOROOT", "GOEXPERIMENT"}
    kept = {key: value for key, value in os.environ.items() if key not in unwanted}
    settings = {
        "CGO_ENABLED": "0",
        "GOWORK": "off",
        "GO111MODULE": "on",
        "GOTOOLCHAIN": "local",
        "GOGC": "400",
    }
    return kept | settings
