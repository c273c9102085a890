"""Decodes the bytes of tokens into text that can be sent: complete characters, no part of a stop text."""

import codecs
from collections.abc import Sequence


class StopMatcher:
    """Matches one stop text against a stream of characters (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._fallback = _fallbacks(text)
        self.matched = 0

    def advance(self, character: str) -> bool:
        """Adds a character; True once the whole stop text matches."""
        while self.matched and self._text[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self._text[self.matched] == character:
            self.matched += 1
        return self.matched == len(self._text)


def _fallbacks(text: str) -> list[int]:
    """For each position, the length of the longest proper prefix of `text` that also ends there."""
    lengths = [0] * len(text)
    matched = 0
    for position in range(1, len(text)):
        while matched and text[matched] != text[position]:
            matched = lengths[matched - 1]
        if text[matched] == text[position]:
            matched += 1
        lengths[position] = matched
    return lengths


class TextStream:
    """The text of one request.

    The joined deltas are the UTF-8 decoding of all bytes (invalid ones become U+FFFD), cut before the first
    complete stop text. They do not depend on how bytes are split into tokens.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = [StopMatcher(stop) for stop in stops]
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Adds the bytes of one token; returns the text that can be sent now."""
        text = self._decoder.decode(data)
        return self._take(text) if self._stops else text

    def finish(self) -> str:
        """Returns the text held back, once generation has ended."""
        ready = self._take(self._decoder.decode(b"", final=True))
        ready, self._held = ready + self._held, ""
        return ready

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        for position, character in enumerate(text):
            complete = [stop.matched for stop in self._stops if stop.advance(character)]
            if complete:
                self.stopped = True
                ready = (self._held + text[: position + 1])[: -max(complete)]
                self._held = ""
                return ready
        text = self._held + text
        keep = max((stop.matched for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
