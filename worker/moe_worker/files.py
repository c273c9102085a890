"""Files that are there whole or not at all, whatever ends the process while they are written."""

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
    """A path beside `path` to write to; at the end it is made durable and takes `path`'s place.

    Where writing fails, what stood at `path` stands there still. Raises WorkerError where the disk is full
    or cannot be written to.
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
    """Holds the lock file at `path`, which is made where it is not there, and gives it back at the end.

    Where another process holds it: waits, or yields False. What ends a process gives back its locks.
    Raises WorkerError where it cannot be made.
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
    """Adds to the end of a text file; a kill may leave the beginning of it. Raises WorkerError."""
    with _writing(path), path.open("a") as file:
        file.write(text)


def copy_file(source: Path, path: Path) -> None:
    """Copies a file by `replacing`."""
    with replacing(path) as beside:
        shutil.copyfile(source, beside)


def make_folder(path: Path) -> None:
    """Makes a folder and those around it, where they are not there. Raises WorkerError."""
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)


def reserve(path: Path) -> None:
    """Takes the room on the disk that a file with holes has not taken yet.

    To be mapped safely: where a map's page finds no room, the kernel kills the process. Raises OSError.
    """
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def digest(path: Path) -> str:
    """SHA-256 of a regular file. Raises WorkerError where it cannot be read."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WorkerError(f"{path} cannot be read ({error.strerror or error})") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What goes wrong on the disk is a WorkerError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorkerError(
            f"{path} could not be written ({reason}); what was there before is unchanged: "
            "make room or choose another place, and run the same command again"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
