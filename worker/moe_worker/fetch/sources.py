"""Clients of Hugging Face's hub and of object stores."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Protocol, cast

from moe_worker.errors import FetchError, SettingsError, SourceError
from moe_worker.fetch.listing import RemoteFile
from moe_worker.fetch.location import Location

_CHUNK: Final = 32 << 20
"""Bytes of one request to an object store."""
_PIECE: Final = 1 << 20
"""Bytes that are held of an answer: what a stall or a restart can lose."""
_REFUSED, _MISSING = (401, 403), 404


class Source(Protocol):
    """Where a checkpoint comes from. Methods raise FetchError if a retry can help, else SourceError."""

    def files(self) -> list[RemoteFile]:
        """All files directly below the location."""

    def download(self, file: RemoteFile, folder: Path) -> None:
        """Downloads a file into a folder; continues from what an interrupted attempt left there."""


def open_source(location: Location, endpoint: str, timeout_s: float) -> Source:
    """The client for a location.

    endpoint: URL of the hub or of the S3 API; empty for the public one. timeout_s: a connection that sends
    nothing for so long is given up. Raises SettingsError where the client is not installed.
    """
    try:
        if location.kind == "hf":
            return _Hub(location, endpoint, timeout_s)
        return _Store(location, endpoint, timeout_s)
    except ImportError as error:
        raise SettingsError(
            f"model {location.uri} cannot be fetched: {error}; install moe-operator[fetch]"
        ) from error


class _Hub:
    """Hugging Face's hub, or a proxy of it. The token is HF_TOKEN."""

    def __init__(self, location: Location, endpoint: str, timeout_s: float) -> None:
        # Read when the library is imported.
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        import huggingface_hub  # noqa: PLC0415 - an optional dependency
        from huggingface_hub import constants  # noqa: PLC0415

        constants.HF_HUB_DOWNLOAD_TIMEOUT = max(1, int(timeout_s))
        self._library, self._location, self._timeout_s = huggingface_hub, location, timeout_s
        self._endpoint, self._token = endpoint or None, os.environ.get("HF_TOKEN") or False
        self._commit = location.revision

    def files(self) -> list[RemoteFile]:
        at = self._location
        with self._translated("its list of files"):
            api = self._library.HfApi(endpoint=self._endpoint, token=self._token)
            info = api.model_info(
                at.place, revision=at.revision, files_metadata=True, timeout=self._timeout_s
            )
        self._commit = str(info.sha)
        return [
            RemoteFile(
                name=one.rfilename,
                size=-1 if one.size is None else int(one.size),
                tag=str(one.blob_id),
                sha256=str(one.lfs.sha256) if one.lfs else "",
                git_sha1="" if one.lfs else str(one.blob_id or ""),
            )
            for one in info.siblings or ()
        ]

    def download(self, file: RemoteFile, folder: Path) -> None:
        # Not hf_hub_download: since 2.4 it begins a file anew after a restart.
        from huggingface_hub.file_download import http_get  # noqa: PLC0415
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

        at, part = self._location, folder / f"{file.name}.part"
        url = self._library.hf_hub_url(at.place, file.name, revision=self._commit, endpoint=self._endpoint)
        with part.open("ab") as out, self._translated(file.name):
            http_get(
                url,
                cast("BinaryIO", _Bounded(out, file, at.uri)),
                resume_size=_kept(out, file),
                headers=build_hf_headers(token=self._token),
                expected_size=file.size,
            )
        part.replace(folder / file.name)

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        # The base of both errors of the transport and of answers.
        from httpx2 import HTTPError  # noqa: PLC0415 - comes with huggingface_hub

        try:
            yield
        except HTTPError as error:
            raise self._explained(what, error) from error
        except ValueError as error:
            raise FetchError(f"model {self._location.uri}: {what}: {error}; retrying") from error

    def _explained(self, what: str, error: Exception) -> FetchError | SourceError:
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        status, uri = getattr(response, "status_code", None), self._location.uri
        if isinstance(error, self._library.errors.GatedRepoError) or status in _REFUSED:
            return SourceError(
                f"model {uri} is refused: the hub answers {status} to {what}; accept the model's terms, and "
                "give a token that may read it as HF_TOKEN in spec.model.credentialsSecret"
            )
        if status == _MISSING:
            return SourceError(f"model {uri} does not exist: the hub answers 404 to {what}; correct the URI")
        said = (
            f"the hub answers {status}"
            if status
            else f"the hub does not answer: {error or type(error).__name__}"
        )
        return FetchError(f"model {uri}: {what}: {said}; retrying")


class _Store:
    """A bucket of S3 or Google Cloud Storage. Credentials are the variables of their own tools."""

    def __init__(self, location: Location, endpoint: str, timeout_s: float) -> None:
        import obstore  # noqa: PLC0415 - an optional dependency
        from obstore import exceptions, store  # noqa: PLC0415

        self._library, self._errors, self._location = obstore, exceptions, location
        limit = timedelta(seconds=timeout_s)
        common: dict[str, Any] = {
            "prefix": location.path or None,
            "client_options": {
                "connect_timeout": limit,
                "read_timeout": limit,
                "timeout": timedelta(minutes=10),
                "allow_http": endpoint.startswith("http://") or bool(os.environ.get("MOE_FETCH_ALLOW_HTTP")),
            },
            "retry_config": {"max_retries": 2, "retry_timeout": 3 * limit},
        }
        if location.kind == "s3":
            more: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
            self._store: Any = store.S3Store(location.place, **more, **common)
        else:
            self._store = store.GCSStore(location.place, **common)

    def files(self) -> list[RemoteFile]:
        with self._translated("its list of files"):
            found = self._library.list_with_delimiter(self._store)["objects"]
        return [
            RemoteFile(
                name=str(one["path"]).rpartition("/")[2], size=int(one["size"]), tag=str(one["e_tag"] or "")
            )
            for one in found
        ]

    def download(self, file: RemoteFile, folder: Path) -> None:
        part = folder / f"{file.name}.part"
        with part.open("ab") as out:
            done = _kept(out, file)
            while done < file.size:
                end = min(done + _CHUNK, file.size)
                options: Any = {"range": (done, end)}
                if file.tag:
                    options["if_match"] = file.tag
                with self._translated(file.name):
                    answer = self._library.get(self._store, file.name, options=options)
                    size = int(answer.meta["size"])
                    if size == file.size:
                        bounded = _Bounded(out, file, self._location.uri, end)
                        for piece in answer.stream(min_chunk_size=_PIECE):
                            bounded.write(piece)
                if size != file.size or out.tell() == done:
                    raise FetchError(
                        f"model {self._location.uri}: {file.name} has {size} bytes, and {file.size} are "
                        "listed; retrying"
                    )
                done = out.tell()
        part.replace(folder / file.name)

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        uri, errors = self._location.uri, self._errors
        try:
            yield
        except (errors.BaseError, FileNotFoundError, PermissionError) as error:
            said, status = _first_line(error), _status(error)
            if status in _REFUSED or isinstance(
                error, (errors.PermissionDeniedError, errors.UnauthenticatedError)
            ):
                remedy = "give credentials that may read it in spec.model.credentialsSecret"
                raise SourceError(f"model {uri} is refused: {what}: {said}; {remedy}") from error
            if status == _MISSING or isinstance(error, (errors.NotFoundError, FileNotFoundError)):
                raise SourceError(f"model {uri} does not exist: {what}: {said}; correct the URI") from error
            if isinstance(error, errors.PreconditionError):
                raise FetchError(f"model {uri}: {what} changed during the download; retrying") from error
            raise FetchError(f"model {uri}: {what}: {said}; retrying") from error


class _Bounded(io.BufferedIOBase):
    """A file that takes no more than its source lists: an answer may be endless.

    end: where the answer has to end, in bytes of the file; default: at its end.
    """

    def __init__(self, out: IO[bytes], file: RemoteFile, uri: str, end: int | None = None) -> None:
        self._out, self._file, self._uri = out, file, uri
        self._end = file.size if end is None else end

    def write(self, data: Any) -> int:
        if self._out.tell() + len(data) > self._end:
            self._out.truncate(0)
            raise FetchError(
                f"model {self._uri}: {self._file.name} is longer than the {self._file.size} bytes that are "
                "listed; retrying"
            )
        return self._out.write(data)

    def tell(self) -> int:
        return self._out.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._out.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        return self._out.truncate(size)


def _kept(part: IO[bytes], file: RemoteFile) -> int:
    """Bytes that an earlier attempt left in a file; none where there are more than there can be."""
    if part.tell() > file.size:
        part.truncate(0)
        part.seek(0)
    return part.tell()


def _status(error: Exception) -> int | None:
    """The HTTP status in a message: errors of listing have no type of their own."""
    match = re.search(r"status code: (\d{3})", str(error))
    return int(match[1]) if match else None


def _first_line(error: Exception) -> str:
    """Errors of the library go on with a dump of their fields."""
    return str(error).partition("\n")[0][:300]
