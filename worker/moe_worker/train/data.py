"""From text to batches of token windows: documents, tokenizer, and a sampler that can resume at any step.

Legend: B windows in a batch, T tokens in a window, N tokens in the corpus.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe_worker.errors import CheckpointError, DataError, TokenizerError
from moe_worker.models.tokenizer import LARGEST_TOKENIZER
from moe_worker.models.tokenizer_guard import try_tokenizer
from moe_worker.progress import tell, transient_bar
from moe_worker.reading import read_file

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1
ENCODED_TOGETHER = 4_000_000  # characters; between such batches progress is shown

# Words with the character before them, numbers in threes, punctuation with its line end, runs of
# spaces: the last matters for manuals, where indentation is a fifth of all bytes.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def read_documents(path: Path) -> list[str]:
    """Reads documents from a text file, plain or compressed with Zstandard (`.zst`).

    NUL bytes separate documents if there are any, otherwise blank lines; empty documents are dropped. Raises
    DataError if the file cannot be read, is not Zstandard, is not UTF-8, or holds no text.
    """
    data = read_bytes(path)
    if path.suffix == ".zst":
        data = _decompress(path, data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 text") from error
    separator = "\0" if "\0" in text else "\n\n"
    documents = [document for document in text.split(separator) if document.strip()]
    if not documents:
        raise DataError(f"{path}: holds no text; give a file with at least one document")
    return documents


def read_bytes(path: Path) -> bytes:
    """The content of the file. Raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file of UTF-8 text") from error


def _decompress(path: Path, data: bytes) -> bytes:
    try:
        import zstandard  # noqa: PLC0415 - machines without it still train on plain text
    except ImportError as error:
        raise DataError(
            f"{path}: reading .zst needs the package zstandard, which is not installed here; install it, or "
            f"give plain text (`zstd -d {path.name}` where there is one)"
        ) from error

    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: is not a Zstandard file ({error}); compress it with `zstd`") from error
        if not frame.eof:
            raise DataError(f"{path}: ends in the middle; copy it again")
        data = frame.unused_data
    return b"".join(parts)


def train_tokenizer(documents: list[str], vocabulary_size: int) -> Tokenizer:
    """Trains a byte-level BPE (Sennrich et al., arXiv 1508.07909) that can encode any text.

    Token 0 begins every encoded text; token 1 ends a text.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocabulary_size < smallest:
        raise DataError(
            f"a vocabulary of {vocabulary_size} cannot hold every byte and the two special tokens; "
            f"ask for {smallest} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if not sys.stderr.isatty():  # the library's own bar would be carriage returns or empty lines there
        tell(f"training a tokenizer of {vocabulary_size} tokens on {len(documents)} documents")
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[BEGIN_OF_TEXT, END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A", special_tokens=[(BEGIN_OF_TEXT, BOS_ID)]
    )
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.json after a child process with limits has read it.

    Raises TokenizerError if it is missing, invalid, or exceeds the limits.
    """
    try:
        try_tokenizer(path)
        return Tokenizer.from_buffer(read_file(path, LARGEST_TOKENIZER))
    except TokenizerError:
        raise
    except CheckpointError as error:
        raise TokenizerError(f"{error}; give a tokenizer.json") from error
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path} is not a tokenizer ({error}); give a tokenizer.json") from error


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[NDArray[np.int32]]:
    """Returns the token ids of each document, without special tokens."""
    tokens: list[NDArray[np.int32]] = []
    total = sum(map(len, documents))
    with transient_bar(total=total, desc="encode", unit="character") as encoded:
        for some in _batches(documents):
            encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
            tokens += [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]
            encoded.update(sum(map(len, some)))
    return tokens


def _batches(documents: list[str]) -> Iterator[list[str]]:
    """Splits documents into runs of about ENCODED_TOGETHER characters."""
    begin, characters = 0, 0
    for index, document in enumerate(documents):
        characters += len(document)
        if characters >= ENCODED_TOGETHER or index + 1 == len(documents):
            yield documents[begin : index + 1]
            begin, characters = index + 1, 0


def join_documents(documents: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Joins documents to one stream of N tokens, each between a begin-of-text and an end-of-text token."""
    bos, eos = np.array([BOS_ID], np.int32), np.array([EOS_ID], np.int32)
    return np.concatenate([part for document in documents for part in (bos, document, eos)])


@dataclass(frozen=True)
class WindowSampler:
    """Draws batches from a token stream: each pass splits it at a new offset and shuffles the windows.

    The batch of a step depends only on the seed and the step, so a resumed run gets the same batches as an
    uninterrupted one.
    """

    tokens_N: torch.Tensor
    """Token stream, int32 or int64, on the device that trains."""
    window: int
    """Tokens in a window, T."""
    batch: int
    """Windows in a batch, B."""
    seed: int

    def __post_init__(self) -> None:
        if self.windows_per_pass < self.batch:
            raise DataError(
                f"the training text has {len(self.tokens_N):,} tokens, too few for a batch of {self.batch} "
                f"windows of {self.window} tokens; give more text or a smaller batch"
            )

    @property
    def windows_per_pass(self) -> int:
        """Windows in one pass; the tokens of one window are left out so that any offset fits."""
        return (len(self.tokens_N) - 1) // self.window - 1

    @property
    def steps_per_pass(self) -> int:
        """Whole batches in one pass."""
        return self.windows_per_pass // self.batch

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs and targets of a step, both int64 of shape [B, T]."""
        device = self.tokens_N.device
        starts_B = torch.from_numpy(self._starts(step)).to(device)  # few: a large copy waits for the device
        index_BT = starts_B.unsqueeze(1) + torch.arange(self.window + 1, device=device)
        window_BT = self.tokens_N[index_BT].long()
        return window_BT[:, :-1], window_BT[:, 1:]

    def places(self, step: int) -> NDArray[np.int64]:
        """Positions of the inputs of a step in the stream, [B, T]."""
        return self._starts(step)[:, None] + np.arange(self.window)

    def _starts(self, step: int) -> NDArray[np.int64]:
        order, offset = self._pass(step // self.steps_per_pass)
        place = step % self.steps_per_pass * self.batch
        return np.asarray(order[place : place + self.batch] * self.window + offset, np.int64)

    def _pass(self, number: int) -> tuple[NDArray[np.int64], int]:
        random = np.random.default_rng([self.seed, number])
        return random.permutation(self.windows_per_pass), int(random.integers(self.window))
