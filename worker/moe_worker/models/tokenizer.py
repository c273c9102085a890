"""The byte-level BPE tokenizer of a checkpoint (tokenizer.json). Imports no torch."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from moe_worker.config.model import ModelConfig
from moe_worker.errors import TokenizerError
from moe_worker.models.layouts import no_tokenizer
from moe_worker.models.special_tokens import SpecialTokens, special_tokens
from moe_worker.reading import present, read_file

# Twice the largest published tokenizer.json.
LARGEST_TOKENIZER = 64 << 20

# Characters tokenized at once where only the number of tokens matters.
_PIECE = 16_384
# A text of so many characters a token is suspect; English has 4 to 5.
_SUSPECT_CHARACTERS = 4
# Normalizers may put characters together: three jamo make one syllable of Hangul.
_NORMALIZED = 4


class Tokenizer:
    """Converts text to token ids, and token ids to bytes."""

    def __init__(self, inner: tokenizers.Tokenizer, special: SpecialTokens, vocab_size: int) -> None:
        self._inner = inner
        self._special = special
        self._vocab_size = vocab_size

    @classmethod
    def load(cls, directory: Path, config: ModelConfig) -> "Tokenizer":
        """Reads tokenizer.json and checks that it belongs to the model. Raises TokenizerError."""
        path = directory / "tokenizer.json"
        if not present(path):
            raise TokenizerError(no_tokenizer(directory))
        inner = _parse(path, read_file(path, LARGEST_TOKENIZER))
        inner.no_truncation()
        inner.no_padding()
        _check_matches(path, inner, config)
        special = special_tokens(directory, inner)
        _check_special(path, special, config)
        return cls(inner, special, config.vocab_size)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text` with the special tokens of the tokenizer's files.

        Special tokens that the text already has are not added again. Raises TokenizerError if the library
        fails.
        """
        try:
            # A batch of one: unlike the library's `encode` it lets other threads run (4 MiB take 2 s).
            ids: list[int] = self._inner.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            # A pattern that gives up on this text; a panic is no Exception and would end the process.
            raise TokenizerError(f"tokenizer.json gives up on the text ({str(error)[:200]})") from error
        return self._special.around(ids) if add_special_tokens else ids

    def encode_unless_longer(self, text: str, most: int, add_special_tokens: bool = True) -> list[int] | None:
        """As `encode`, or None if the text clearly has more than `most` tokens, which is cheaper to find out.

        The library takes about 250 bytes of memory per token, so a text that is far too long is refused
        early. A text that is slightly too long returns all its ids.
        """
        return None if self._is_longer(text, most) else self.encode(text, add_special_tokens)

    @property
    def characters_per_token(self) -> int:
        """Most characters that one token represents: longer texts have more tokens."""
        shrinks = 1 if self._inner.normalizer is None else _NORMALIZED
        return self.longest_token_bytes * shrinks

    @cached_property
    def longest_token_bytes(self) -> int:
        """Most bytes that one token represents."""
        added = (token.content for token in self._inner.get_added_tokens_decoder().values())
        # In a byte-level vocabulary each character of a token's name is a byte.
        names = self._inner.get_vocab(with_added_tokens=False)
        return max(max(map(len, names), default=1), max((len(text.encode()) for text in added), default=1))

    def _is_longer(self, text: str, most: int) -> bool:
        """Whether the text certainly has more than `most` tokens; tokenizes a suspect text piece by piece."""
        if len(text) > most * self.characters_per_token:
            return True
        if len(text) <= most * _SUSPECT_CHARACTERS:
            return False
        tokens = 0
        for start in range(0, len(text), _PIECE):
            # Where a piece is cut within a word, the whole word has other tokens, a few less at most.
            tokens += len(self.encode(text[start : start + _PIECE], False)) - self.longest_token_bytes
            if tokens > most:
                return True
        return False

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token adds to the text; special tokens and unknown ids add none."""
        return self._bytes[token]

    def piece(self, token: int) -> bytes:
        """The bytes of a token, or the name of a special token; b"" for unknown ids."""
        return self._bytes[token] or (self._inner.id_to_token(token) or "").encode()

    @cached_property
    def _bytes(self) -> list[bytes]:
        special = {id_ for id_, added in self._inner.get_added_tokens_decoder().items() if added.special}
        names = [None if id_ in special else self._inner.id_to_token(id_) for id_ in range(self._vocab_size)]
        return [b"" if name is None else _from_byte_level(name) for name in names]


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: the printable character that represents each byte in a token's name."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_level_alphabet()


def _from_byte_level(name: str) -> bytes:
    """Bytes of a token by its name; a name outside the alphabet (an added token) is plain text."""
    if all(character in _ALPHABET for character in name):
        return bytes(_ALPHABET[character] for character in name)
    return name.encode()


def _parse(path: Path, content: bytes) -> tokenizers.Tokenizer:
    try:
        values: Any = json.loads(content)
        decoder = values.get("decoder") if isinstance(values, dict) else None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON ({str(error)[:200]}); copy it again") from error
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise TokenizerError(f"{path}: the decoder must be ByteLevel (byte-level BPE), as DeepSeek's is")
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path} is not a tokenizer ({str(error)[:300]}); copy it again") from error


def _check_matches(path: Path, inner: tokenizers.Tokenizer, config: ModelConfig) -> None:
    largest = max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise TokenizerError(
            f"{path} does not match the model: it has token id {largest}, "
            f"but config.json's vocab_size allows ids below {config.vocab_size}"
        )
    for id_ in config.eos_token_ids:
        if inner.id_to_token(id_) is None:
            raise TokenizerError(
                f"{path} does not match the model: it has no token {id_}, which is config.json's eos_token_id"
            )


def _check_special(path: Path, special: SpecialTokens, config: ModelConfig) -> None:
    largest = max(special.around([]), default=0)
    if largest >= config.vocab_size:
        raise TokenizerError(
            f"{path} does not match the model: its post_processor adds token id {largest}, "
            f"but config.json's vocab_size allows ids below {config.vocab_size}"
        )
