"""The cache: entries by content, locks among processes, room on the disk, eviction.

ROOT/KEY is a complete checkpoint, ROOT/KEY.partial one that is downloaded, ROOT/KEY.lock the lock of both:
held alone by who downloads or evicts, shared by who reads. Its time of change is that of the last use.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from moe_worker.errors import FetchError
from moe_worker.fetch.listing import gibibytes
from moe_worker.files import locked, make_folder

_LOCK, _PARTIAL = ".lock", ".partial"
KEPT_S: Final = 600.0
"""An entry that was used this recently is not evicted: its worker may just be starting."""
_SPARE: Final = 64 << 20
"""Bytes that stay free on the disk."""


@dataclass(frozen=True)
class CheckpointCache:
    """root: the folder; most_bytes: what all entries may take together, 0 for as much as fits."""

    root: Path
    most_bytes: int = 0

    def entry(self, key: str) -> Path:
        """The folder of a complete checkpoint."""
        return self.root / key

    def staging(self, key: str) -> Path:
        """The folder of one that is downloaded."""
        return self.root / f"{key}{_PARTIAL}"

    @contextlib.contextmanager
    def alone(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Holds an entry's lock; yields False where another process has it and `wait` is not set."""
        with locked(self.root / f"{key}{_LOCK}", wait=wait) as mine:
            yield mine

    def used(self, key: str) -> None:
        """Marks an entry as used now."""
        os.utime(self.root / f"{key}{_LOCK}")

    def make_room(self, key: str, needed: int, uri: str) -> None:
        """Evicts entries, the least recently used first, until `needed` bytes fit. Raises FetchError."""
        make_folder(self.root)
        now = time.time()  # compared with times of files
        others = sorted((used, name) for name, used in self._others(key) if now - used >= KEPT_S)
        while (lacking := self._lacking(needed)) > 0 and others:
            self._evict(others.pop(0)[1])
        if lacking > 0:
            free = shutil.disk_usage(self.root).free
            bound = f", and the cache may take {gibibytes(self.most_bytes)}" if self.most_bytes else ""
            raise FetchError(
                f"model {uri} does not fit: {gibibytes(needed)} to download, {gibibytes(free)} free in "
                f"{self.root}{bound}; free space, or give spec.model.cache a larger volume"
            )

    def _lacking(self, needed: int) -> int:
        """Bytes to free before `needed` more fit."""
        lacking = needed + _SPARE - shutil.disk_usage(self.root).free
        if self.most_bytes:
            taken = sum(size_of(path) for path in self.root.iterdir() if path.is_dir())
            lacking = max(lacking, taken + needed - self.most_bytes)
        return lacking

    def _others(self, key: str) -> Iterator[tuple[str, float]]:
        """Other entries, complete or not, and when each was used last."""
        for path in self.root.glob(f"*{_LOCK}"):
            name = path.name.removesuffix(_LOCK)
            if name != key and (self.entry(name).exists() or self.staging(name).exists()):
                yield name, path.stat().st_mtime

    def _evict(self, key: str) -> None:
        with self.alone(key, wait=False) as mine:
            if mine:
                for path in (self.entry(key), self.staging(key)):
                    shutil.rmtree(path, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, some of which may be written or removed meanwhile."""
    found = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += (Path(path) / name).stat().st_size
    return found


def hold(model: Path) -> IO[bytes] | None:
    """Keeps an entry of a cache from being evicted as long as the returned file is open.

    None where the folder is no entry, or is being downloaded.
    """
    real = Path(os.path.realpath(model))
    try:
        file = real.with_name(f"{real.name}{_LOCK}").open("rb")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
