"""Files of a mounted Secret or ConfigMap, read again when they change.

The kubelet replaces all files of a volume at once: they are links through ``..data``, itself a link to a
directory, which then leads to another directory. So all files of one snapshot are read from one directory.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Generic, TypeVar

_LOG: Final = logging.getLogger(__name__)
BYTES_MOST: Final = 2 * 2**20
"""Of all files together; the API server allows a Secret 1 MiB."""
FILES_MOST: Final = 20_000
INTERVAL_S: Final = 2.0
T = TypeVar("T")


class MountedError(Exception):
    """A folder cannot be read, or its files are not what they have to be; the text names it."""


class Mounted(Generic[T]):
    """The value in the files of a folder: the present one, or the last valid one.

    Args:
        folder: where the volume is mounted.
        parse: makes the value of the files, by name; a ValueError says what is wrong with them.
        changed: is told a new value, in the thread of the event loop.

    Raises:
        MountedError: there is no valid value at the start.
    """

    def __init__(
        self,
        folder: Path,
        parse: Callable[[Mapping[str, bytes]], T],
        changed: Callable[[T], None] | None = None,
    ) -> None:
        self._folder = folder
        self._parse = parse
        self._changed = changed
        self._files = read(folder)
        self._error = ""
        self.value = self._parsed(self._files)

    async def watch(self) -> None:
        """Reads the files again and again; never returns."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Reads the files, and takes their value if it is new and valid."""
        try:
            files = await asyncio.to_thread(read, self._folder)
            if files == self._files:
                self._error = ""
                return
            value = await asyncio.to_thread(self._parsed, files)
        except MountedError as error:
            if str(error) != self._error:
                _LOG.error("%s; the last valid content stays in force", error)
            self._error = str(error)
            return
        self._files, self._error, self.value = files, "", value
        _LOG.info("%s changed and was read again", self._folder)
        if self._changed is not None:
            self._changed(value)

    def _parsed(self, files: Mapping[str, bytes]) -> T:
        try:
            return self._parse(files)
        except ValueError as error:
            raise MountedError(f"{self._folder} is not valid: {error}") from error


def read(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, without those whose names begin with a dot; links are followed.

    Raises:
        MountedError: it cannot be read, or it is too large.
    """
    try:
        # Where it is not a volume there is no ..data.
        data = (folder / "..data").resolve()
        real = data if data.is_dir() else folder
        files = [path for path in sorted(real.iterdir()) if not path.name.startswith(".") and path.is_file()]
        if len(files) > FILES_MOST or sum(path.stat().st_size for path in files) > BYTES_MOST:
            raise MountedError(f"{folder} is too large: {len(files)} files; {BYTES_MOST} bytes is the most")
        return {path.name: path.read_bytes() for path in files}
    except OSError as error:
        raise MountedError(f"{folder} cannot be read: {error.strerror or error}") from error
