"""The rates of the last 14 days by minute, small enough to be stored in a Kubernetes object."""

from __future__ import annotations

import base64
import binascii
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moe_operator.errors import MoEOperatorError

MINUTES: Final = 14 * 24 * 60
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<BQH")
_UNKNOWN, _ZERO, _FIRST = 0, 1, 2
_STEP: Final = math.log1p(0.001)
"""Rates are stored to within 0.05 %, far below their noise."""
_SMALLEST: Final = 1e-6
_LARGEST: Final = _SMALLEST * math.exp(_STEP * (2**16 - 1 - _FIRST))


class HistoryError(MoEOperatorError):
    """The stored history cannot be read."""


class History:
    """Rates of the latest minutes, work per minute; unknown ones are NaN."""

    def __init__(self) -> None:
        self._codes: NDArray[np.uint16] = np.zeros(0, np.uint16)
        self._end = 0

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def end(self) -> int:
        """The minute after the last one; 0 if there is none."""
        return self._end

    def add(self, minute: int, rate: float | None) -> None:
        """Appends the rate of a minute. Skipped minutes are unknown; earlier ones are ignored.

        rate: work per minute; None, negative or not finite: unknown. Stored to within 0.05 %.
        """
        if self._end and minute < self._end:
            return
        gap = min(minute - self._end, MINUTES) if self._end else 0
        added = np.zeros(gap + 1, np.uint16)
        added[-1] = _code(rate)
        self._codes = np.concatenate([self._codes, added])[-MINUTES:]
        self._end = minute + 1

    def rates(self) -> NDArray[np.float64]:
        """Work per minute of each minute up to `end`, oldest first; NaN where unknown."""
        values = _SMALLEST * np.exp(_STEP * (self._codes.astype(np.float64) - _FIRST))
        values[self._codes == _ZERO] = 0.0
        values[self._codes == _UNKNOWN] = np.nan
        return values

    def items(self) -> Iterator[tuple[int, float | None]]:
        """(minute, rate) of each minute, oldest first; None where unknown."""
        first = self._end - len(self._codes)
        for offset, rate in enumerate(self.rates()):
            yield first + offset, None if math.isnan(rate) else float(rate)

    def since(self, minute: int) -> History:
        """The rates since `minute`."""
        later = History()
        later._codes = self._codes[max(len(self._codes) - max(self._end - minute, 0), 0) :].copy()
        later._end = self._end
        return later

    def until(self, minute: int) -> History:
        """The rates before `minute`."""
        earlier = History()
        earlier._codes = self._codes[: max(len(self._codes) - max(self._end - minute, 0), 0)].copy()
        earlier._end = min(self._end, minute) if len(earlier._codes) else 0
        return earlier

    def extend(self, later: History) -> None:
        """Appends the rates that `later` has of the following minutes."""
        for minute, rate in later.items():
            self.add(minute, rate)

    def dump(self) -> str:
        """The history as ASCII text of at most 72 KiB."""
        differences = np.diff(self._codes, prepend=np.uint16(0))  # wraps around, and back in load
        planes = differences.view(np.uint8).reshape(-1, 2).T.tobytes()  # high bytes are mostly equal
        packed = zlib.compress(planes, 9)
        return base64.b64encode(_HEADER.pack(_VERSION, self._end, len(self._codes)) + packed).decode("ascii")

    @staticmethod
    def load(text: str) -> History:
        """Reads what `dump` wrote.

        Raises:
            HistoryError: it is invalid or of a later version.
        """
        try:
            raw = base64.b64decode(text, validate=True)
            version, end, length = _HEADER.unpack_from(raw)
            if version != _VERSION:
                raise HistoryError(f"rates: its version is {version}; this operator reads {_VERSION}")
            unpacker = zlib.decompressobj()
            planes = unpacker.decompress(raw[_HEADER.size :], 2 * MINUTES + 1)
        except (binascii.Error, ValueError, struct.error, zlib.error) as error:
            raise HistoryError(f"rates: {error}") from error
        if len(planes) != 2 * length or length > MINUTES or end < length or not unpacker.eof:
            raise HistoryError("rates: its length does not match its header")
        history = History()
        differences = np.frombuffer(planes, np.uint8).reshape(2, -1).T.copy().view(np.uint16).ravel()
        history._codes = np.cumsum(differences, dtype=np.uint16)
        history._end = end
        return history


def _code(rate: float | None) -> int:
    if rate is None or not math.isfinite(rate) or rate < 0:
        return _UNKNOWN
    if rate < _SMALLEST:
        return _ZERO
    return _FIRST + round(math.log(min(rate, _LARGEST) / _SMALLEST) / _STEP)
