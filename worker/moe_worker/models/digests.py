"""Compares the files of a checkpoint with the SHA-256 digests stored with them."""

import hashlib
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_worker.config.directory import read_json
from moe_worker.errors import CheckpointError
from moe_worker.models.layouts import INDEX_FILE
from moe_worker.models.safetensors import LARGEST_INDEX
from moe_worker.progress import bar
from moe_worker.reading import open_file, present, read_file

LARGEST_LIST = 1 << 20
_HEX = re.compile(r"[0-9a-fA-F]{64}")
_LINE = re.compile(r"([0-9a-fA-F]{64})(?: [ *](.+))?")
log = logging.getLogger(__name__)


def check_digests(directory: Path, threads: int, progress: bool = False) -> None:
    """Reads every file that has a stored digest, `threads` files at a time. Raises CheckpointError.

    `progress` shows a bar on stderr.
    """
    stated = known_digests(directory)
    plain = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in stated)
    if plain:
        log.warning("no SHA-256 digest is stated for %d weight files, the first is %s", len(plain), plain[0])
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(lambda name: _digest(directory / name), stated)
        shown = bar(digests, total=len(stated), desc="checking digests", unit="file", disable=not progress)
        for name, found in zip(stated, shown, strict=True):
            if found != stated[name]:
                raise CheckpointError(
                    f"{directory / name} is damaged: its SHA-256 is {found}, and {stated[name]} is stated "
                    "for it; copy it again"
                )
    log.info("%d files have the SHA-256 digests that are stated for them", len(stated))


def known_digests(directory: Path) -> dict[str, str]:
    """File name to SHA-256 in lower-case hex, from all stored digests. Raises CheckpointError.

    Sources, in rising precedence: `metadata.sha256` of the index, an object by file name; names of blobs in a
    Hugging Face cache, and the metadata of `hf download --local-dir`; `*.sha256` and SHA256SUMS in sha256sum
    format.
    """
    found = dict(_of_index(directory)) | dict(_of_hugging_face(directory))
    for path in sorted({*directory.glob("*.sha256"), *directory.glob("SHA256SUMS*")}):
        found |= dict(_listed(path))
    return {name: digest.lower() for name, digest in found.items()}


def _of_index(directory: Path) -> Iterator[tuple[str, str]]:
    path = directory / INDEX_FILE
    metadata = read_json(path, LARGEST_INDEX).get("metadata") if present(path) else None
    stated = metadata.get("sha256") if isinstance(metadata, dict) else None
    for name, digest in (stated if isinstance(stated, dict) else {}).items():
        if Path(name).name != name or not isinstance(digest, str) or not _HEX.fullmatch(digest):
            raise CheckpointError(f"{path}: metadata.sha256 must give 64 hexadecimal digits for file names")
        yield name, digest


def _of_hugging_face(directory: Path) -> Iterator[tuple[str, str]]:
    """Large files are named by their SHA-256 in blobs/ and have it as ETag in *.metadata; other files have a
    SHA-1.
    """
    for path in directory.iterdir():
        target = path.readlink() if path.is_symlink() else path
        if target.parent.name == "blobs" and _HEX.fullmatch(target.name):
            yield path.name, target.name
    for path in (directory / ".cache" / "huggingface" / "download").glob("*.metadata"):
        lines = read_file(path, LARGEST_LIST).decode(errors="replace").split("\n")
        if len(lines) > 1 and _HEX.fullmatch(lines[1]) and present(directory / path.stem):
            yield path.stem, lines[1]


def _listed(path: Path) -> Iterator[tuple[str, str]]:
    """Lines with a digest and a name. A digest alone belongs to the file that `path` is named after."""
    for line in read_file(path, LARGEST_LIST).decode(errors="replace").splitlines():
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise CheckpointError(f"{path} contains a line that is not in sha256sum format: {line[:100]!r}")
        name = match[2] or path.name.removesuffix(".sha256")
        yield Path(name).name, match[1]


def _digest(path: Path) -> str:
    with open_file(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; copy it again") from error
