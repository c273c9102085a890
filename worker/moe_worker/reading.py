"""Opens files of a checkpoint: regular files only, bounded in size, without blocking on FIFOs and devices."""

import io
import os
import stat
from pathlib import Path

from moe_worker.errors import CheckpointError

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
_KINDS = (
    (stat.S_ISDIR, "Is a directory"),
    (stat.S_ISFIFO, "Is a FIFO"),
    (stat.S_ISCHR, "Is a character device"),
    (stat.S_ISBLK, "Is a block device"),
    (stat.S_ISSOCK, "Is a socket"),
)


def present(path: Path) -> bool:
    """Whether there is something at `path`, including a broken symbolic link."""
    return os.path.lexists(path)


def is_directory(path: Path) -> bool:
    """Whether `path` leads to a directory; False for an impossible name or a loop of links."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def open_file(path: Path) -> io.BufferedReader:
    """A regular file, open for reading. A FIFO or a device is refused at once, without waiting for a writer.

    Raises CheckpointError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}; give a readable file") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "Is no file")
        raise CheckpointError(f"{path} cannot be read: {kind}; give a regular file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises CheckpointError."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CheckpointError(
                f"{path} is too large: it has {size} bytes, {most} are allowed; give the file that belongs "
                "to the model"
            )
        try:
            content = file.read(most)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; give a readable file") from error
    refuse_pointer(path, content)
    return content


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raises CheckpointError if `head`, the start of a file, is that of a Git LFS pointer."""
    if head.startswith(LFS_HEAD):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: the repository was cloned without Git LFS; "
            "run `git lfs pull` in it, or download the file"
        )


def _missing(path: Path) -> CheckpointError:
    if not path.is_symlink():
        return CheckpointError(f"{path} is missing; a directory without {path.name} is not complete")
    target = path.readlink()
    remedy = "copy the files that the links name (cp -L), or mount the directory that holds both"
    if "blobs" in target.parts:
        remedy = (
            "in a Hugging Face cache the files lie in blobs/: mount the whole models--... directory and give "
            "that as the model, or copy the snapshot with `cp -rL`"
        )
    return CheckpointError(f"{path} is a symbolic link to {target}, which does not exist; {remedy}")
