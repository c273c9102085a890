"""Files that are there whole or not at all, whatever ends the process while they are written."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_worker.errors import WorkerError

UNFINISHED = ".unfinished"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end it is made durable and takes `path`'s place.

    Where writing fails, what stood at `path` stands there still. Raises WorkerError where the disk is full
    or cannot be written to.
    """
    beside = path.with_name(path.name + UNFINISHED)
    try:
        yield beside
        _sync(beside)
        beside.replace(path)
        _sync(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise WorkerError(
            f"{path} could not be written ({error.strerror or error}); what was there before is unchanged: "
            "make room or choose another place, and run the same command again"
        ) from error


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock file at `path`, which is made where it is not there, and gives it back at the end.

    Where another process holds it: waits, or yields False. What ends a process gives back its locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
