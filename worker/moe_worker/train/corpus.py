"""The text of a run: its tokenizer, its token stream and the documents that are scored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moe_worker.config.routing_report import LONGEST_DOMAIN, MOST_DOMAINS
from moe_worker.errors import DataError
from moe_worker.files import locked, replacing, write_text
from moe_worker.progress import tell
from moe_worker.train import data
from moe_worker.train.score import Window
from moe_worker.train.settings import TrainSettings


@dataclass(frozen=True)
class ScoredText:
    """Documents and their tokens."""

    documents: list[str]
    tokens: list[Window]


@dataclass(frozen=True)
class Domains:
    """Names of domains, and the number of each token's in the training text, int8."""

    names: tuple[str, ...]
    tokens_N: NDArray[np.int8]

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers."""
        return hashlib.sha256(self.tokens_N.tobytes()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Training text as one stream of tokens, and the text to score during training, if any."""

    tokenizer: Tokenizer
    stream_N: NDArray[np.int32]
    valid: ScoredText | None
    domains: Domains | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the token stream."""
        return hashlib.sha256(self.stream_N.tobytes()).hexdigest()


def read_corpus(settings: TrainSettings, vocabulary: int) -> Corpus:
    """Reads and encodes the text, which takes minutes for a large one. Raises DataError or TokenizerError."""
    if settings.valid is not None:
        data.read_documents(settings.valid)
    if settings.domains is not None:
        read_labels(settings.domains, len(data.read_documents(settings.data)))
    tokenizer = _tokenizer(settings, vocabulary)
    stream_N = _stream(settings, tokenizer)
    domains = None if settings.domains is None else read_domains(settings.domains, stream_N)
    return Corpus(tokenizer, stream_N, _valid(settings, tokenizer), domains)


def read_labels(path: Path, documents: int) -> list[str]:
    """The domain of each of so many documents, one a line. Raises DataError."""
    labels = data.read_bytes(path).decode("utf-8", errors="replace").splitlines()
    if len(set(labels)) > MOST_DOMAINS or max(map(len, labels), default=0) > LONGEST_DOMAIN:
        raise DataError(
            f"{path}: has {len(set(labels))} different labels; use at most {MOST_DOMAINS}, of up to "
            f"{LONGEST_DOMAIN} characters"
        )
    if len(labels) != documents:
        raise DataError(
            f"{path}: has {len(labels)} labels for {documents} documents; give one a line for each document"
        )
    return labels


def read_domains(path: Path, stream_N: NDArray[np.int32]) -> Domains:
    """Domains of a stream's documents by their labels, one a line. Raises DataError."""
    begins_N = stream_N == data.BOS_ID
    labels = read_labels(path, int(begins_N.sum()))
    names = sorted(set(labels))
    numbers = np.array([names.index(label) for label in labels], np.int8)
    return Domains(tuple(names), numbers[np.cumsum(begins_N) - 1])


def _stream(settings: TrainSettings, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The encoded text, cached under a name that depends on the text and the tokenizer.

    Encoding 1 to 2 MB takes one core a second.
    """
    text = data.read_bytes(settings.data)
    key = hashlib.sha256(text + tokenizer.to_str().encode()).hexdigest()
    kept = settings.shared / f"tokens-{key[:12]}.npy"
    with locked(kept.with_suffix(".lock")):
        if not kept.exists():
            documents = data.read_documents(settings.data)
            tell(f"encoding {len(text) / 1e6:.1f} MB of text")
            stream_N = data.join_documents(data.encode_documents(tokenizer, documents))
            small = stream_N.astype(np.min_scalar_type(tokenizer.get_vocab_size()))
            with replacing(kept) as beside, beside.open("wb") as file:
                np.save(file, small)
    try:
        return np.asarray(np.load(kept), np.int32)
    except (OSError, ValueError) as error:
        raise DataError(f"{kept}: cannot be read ({error}); remove it to encode the text again") from error


def _valid(settings: TrainSettings, tokenizer: Tokenizer) -> ScoredText | None:
    if settings.valid is None:
        return None
    documents = data.read_documents(settings.valid)
    return ScoredText(documents, data.encode_documents(tokenizer, documents))


def _tokenizer(settings: TrainSettings, vocabulary: int) -> Tokenizer:
    """The given tokenizer, else that of the resumed run, else a new one."""
    own, start = settings.out / "tokenizer.json", settings.start_from
    given = settings.tokenizer or (start / "tokenizer.json" if start else None)
    given = given or (own if own.exists() else None)
    if given is None:
        tokenizer = data.train_tokenizer(data.read_documents(settings.data), vocabulary)
        write_text(own, tokenizer.to_str(pretty=True))
        return tokenizer
    tokenizer = data.read_tokenizer(given)
    if tokenizer.get_vocab_size() > vocabulary:
        raise DataError(
            f"{given}: has {tokenizer.get_vocab_size()} tokens, more than the vocab_size of "
            f"{vocabulary} in {settings.config}; make the two agree"
        )
    return tokenizer
