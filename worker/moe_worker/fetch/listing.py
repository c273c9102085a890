"""Which files a checkpoint consists of, and the key of their content. Pure."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from moe_worker.errors import SourceError

_WANTED: Final = re.compile(
    r"[\w.-]+\.(json|safetensors|txt|model|jinja|sha256|py\.sha256)|SHA256SUMS[\w.]*|tokenizer[\w.-]*"
)
"""Names of files that a worker reads. No code, no other weight formats, no folders."""
_FILES_MOST: Final = 4096
_BYTES_MOST: Final = 1 << 50


@dataclass(frozen=True)
class RemoteFile:
    """One file at its source.

    tag: identifies the content at the source (a blob id, an ETag); sha256, git_sha1: digests of the content
    in hex, git's over its blob header too; empty where the source states none.
    """

    name: str
    size: int
    tag: str = ""
    sha256: str = ""
    git_sha1: str = ""


def checkpoint_files(found: Iterable[RemoteFile], uri: str) -> tuple[RemoteFile, ...]:
    """The files to download, by name. Raises SourceError where they are no checkpoint."""
    files = sorted((one for one in found if _WANTED.fullmatch(one.name)), key=lambda one: one.name)
    if not any(one.name == "config.json" for one in files):
        raise SourceError(f"model {uri} is no checkpoint: it has no config.json; correct the URI")
    if not any(one.name.endswith(".safetensors") for one in files):
        raise SourceError(
            f"model {uri} has no weights in safetensors format: it has {len(files)} other files; convert it"
        )
    if len(files) > _FILES_MOST or total(files) > _BYTES_MOST or any(one.size < 0 for one in files):
        raise SourceError(
            f"model {uri} has an impossible list of files: {len(files)} with {total(files)} bytes; "
            "check the source"
        )
    return tuple(files)


def total(files: Iterable[RemoteFile]) -> int:
    """Bytes of the files."""
    return sum(one.size for one in files)


def key(files: Iterable[RemoteFile]) -> str:
    """Names the content: equal files give the same name, whatever their source calls them."""
    stated = [[one.name, one.size, one.sha256 or one.git_sha1 or one.tag] for one in files]
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:32]


def gibibytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
