"""What the URI of a model means. Pure."""

import re
from dataclasses import dataclass
from typing import Final

from moe_worker.errors import SettingsError

_HUB: Final = re.compile(r"hf://([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:@([\w./-]{1,255}))?")
_STORE: Final = re.compile(r"(s3|gs)://([a-z0-9][a-z0-9._-]{1,221}[a-z0-9])((?:/[\w.@+=,~-]+)*)/?")


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is.

    kind: "hf", "s3" or "gs"; place: owner/name, or the bucket; path: below the bucket; revision: of the hub.
    """

    uri: str
    kind: str
    place: str
    path: str = ""
    revision: str = "main"


def parse(uri: str) -> Location:
    """The location that a URI names. Raises SettingsError."""
    if match := _HUB.fullmatch(uri):
        return Location(uri, "hf", match[1], revision=match[2] or "main")
    if match := _STORE.fullmatch(uri):
        return Location(uri, match[1], match[2], match[3].strip("/"))
    raise SettingsError(
        f"model {uri!r} cannot be fetched: it is neither hf://OWNER/NAME[@REVISION] nor s3://BUCKET/PATH nor "
        "gs://BUCKET/PATH; correct the URI"
    )
