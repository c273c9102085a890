"""Downloads the files of a checkpoint, and checks them against what the source states."""

import errno
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_api.backoff import Backoff
from moe_worker.errors import DiskFullError, FetchError
from moe_worker.fetch.cache import size_of
from moe_worker.fetch.listing import RemoteFile
from moe_worker.fetch.sources import Source
from moe_worker.reading import open_file

AT_ONCE: Final = 4
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


_BACKOFF: Final = Backoff(first_s=1.0, longest_s=30.0)


@dataclass(frozen=True)
class Patience:
    """attempts: failures in a row without a new byte until a download is given up."""

    attempts: int = 5
    backoff: Backoff = _BACKOFF
    sleep: Callable[[float], None] = time.sleep


def patiently(
    work: Callable[[], None], measure: Callable[[], int], patience: Patience, tell: Callable[[str], None]
) -> None:
    """Repeats `work` after each FetchError, unless it made no progress several times in a row."""
    failures, best = 0, measure()
    while True:
        try:
            return work()
        except DiskFullError:
            raise  # the kubelet tries again, with longer pauses
        except FetchError as error:
            failures, best = (failures + 1, best) if measure() <= best else (1, measure())
            if failures >= patience.attempts:
                raise
            tell(str(error))
            patience.sleep(patience.backoff.pause_s(failures, random.random()))  # noqa: S311 - jitter


def download(
    source: Source, files: Iterable[RemoteFile], folder: Path, patience: Patience, tell: Callable[[str], None]
) -> None:
    """Downloads the files that are not in the folder yet, and checks each.

    Raises FetchError or SourceError.
    """

    def one(file: RemoteFile) -> None:
        patiently(lambda: _fetch(source, file, folder), lambda: size_of(folder), patience, tell)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="download") as pool:
        waiting = [pool.submit(one, file) for file in files]
        try:
            for each in waiting:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fetch(source: Source, file: RemoteFile, folder: Path) -> None:
    target = folder / file.name
    try:
        if not (target.exists() and target.stat().st_size == file.size):
            source.download(file, folder)
        _check(target, file)
    except OSError as error:
        if error.errno not in _FULL:
            raise FetchError(f"{target} cannot be written: {error}; retrying") from error
        raise DiskFullError(
            f"the disk is full: {file.name} of {file.size} bytes cannot be written to {folder}: "
            f"{os.strerror(error.errno or 0)}; free space, or give spec.model.cache a larger volume"
        ) from error


def _check(path: Path, file: RemoteFile) -> None:
    """Compares size and digests; removes a file that is wrong, so that the next attempt begins anew."""
    found = path.stat().st_size
    wrong = (
        f"has {found} bytes, and {file.size} are listed" if found != file.size else _other_digest(path, file)
    )
    if wrong:
        path.unlink()
        raise FetchError(f"{file.name} is damaged: it {wrong}; retrying")


def _other_digest(path: Path, file: RemoteFile) -> str:
    if file.sha256:
        with open_file(path) as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        return "" if found == file.sha256 else f"has the SHA-256 {found}, and {file.sha256} is listed"
    if file.git_sha1:
        digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with open_file(path) as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        return (
            "" if digest.hexdigest() == file.git_sha1 else f"is not the blob {file.git_sha1} that is listed"
        )
    return ""
