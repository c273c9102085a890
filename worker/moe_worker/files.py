"""Atomic file writes: a file is complete or unchanged, even if the process is killed meanwhile."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moe_worker.errors import WorkerError
from moe_worker.reading import open_file

UNFINISHED = ".unfinished"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`; at the end the file is made durable and renamed to `path`.

    If writing fails, the file at `path` is unchanged. Raises WorkerError if the disk is full or not writable.
    """
    beside = path.with_name(path.name + UNFINISHED)
    try:
        with _writing(path):
            yield beside
            _sync(beside)
            beside.replace(path)
            _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock file at `path`, which is created if necessary, and releases it at the end.

    If another process holds it: waits, or yields False. The kernel releases the locks of a process that ends.
    Raises WorkerError if the file cannot be created.
    """
    make_folder(path.parent)
    with _writing(path):
        opened = path.open("a")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def write_text(path: Path, text: str) -> None:
    """Writes a text file by `replacing`."""
    with replacing(path) as beside:
        beside.write_text(text)


def append_text(path: Path, text: str) -> None:
    """Appends to a text file; after a kill only a part may be there. Raises WorkerError."""
    with _writing(path), path.open("a") as file:
        file.write(text)


def copy_file(source: Path, path: Path) -> None:
    """Copies a file by `replacing`."""
    with replacing(path) as beside:
        shutil.copyfile(source, beside)


def make_folder(path: Path) -> None:
    """Creates a folder and its parents, if missing. Raises WorkerError."""
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)


def reserve(path: Path) -> None:
    """Allocates the disk space for the holes of a sparse file.

    Needed to map the file safely: if a mapped page finds no space, the kernel kills the process. Raises
    OSError.
    """
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def digest(path: Path) -> str:
    """SHA-256 of a regular file. Raises WorkerError if it cannot be read."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WorkerError(f"{path} cannot be read ({error.strerror or error})") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns disk errors into a WorkerError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorkerError(
            f"{path} could not be written ({reason}); the previous file is unchanged: "
            "make room or choose another place, and run the same command again"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
