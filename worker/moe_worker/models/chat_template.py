"""The chat template of a checkpoint. Frontends render it. Imports no torch.

As in transformers, chat_template.jinja takes precedence over `chat_template` in tokenizer_config.json, which
is a text or a list of named ones; "default" is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from moe_worker.config.directory import read_json
from moe_worker.config.fields import is_unicode
from moe_worker.errors import CheckpointError
from moe_worker.models.special_tokens import LARGEST_TOKENIZER_CONFIG, TOKENIZER_CONFIG
from moe_worker.reading import present, read_file

CHAT_TEMPLATE: Final = "chat_template.jinja"
LARGEST_TEMPLATE: Final = 256 << 10
"""Bytes; ten times the largest published one. It travels in moe_api.inference.v1.Model."""
_LARGEST_TOKEN: Final = 256
_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the texts of the special tokens that it may use."""

    template: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def chat_template(directory: Path) -> ChatTemplate | None:
    """The template of the checkpoint in `directory`, if it has one. Raises CheckpointError."""
    path = directory / TOKENIZER_CONFIG
    values = read_json(path, LARGEST_TOKENIZER_CONFIG) if present(path) else {}
    template = _of_file(directory / CHAT_TEMPLATE) or _of_config(path, values.get("chat_template"))
    return ChatTemplate(template, _special_tokens(values)) if template else None


def _of_file(path: Path) -> str:
    if not present(path):
        return ""
    try:
        return read_file(path, LARGEST_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error.reason}; copy it again") from error


def _of_config(path: Path, given: Any) -> str:
    if isinstance(given, list):
        given = next((one.get("template") for one in given if _is_default(one)), None)
    if given is None:
        return ""
    if not isinstance(given, str) or not is_unicode(given):
        raise CheckpointError(f"{path}: chat_template is not a text; copy the file again")
    if len(given.encode()) > LARGEST_TEMPLATE:
        raise CheckpointError(
            f"{path}: chat_template has {len(given.encode())} bytes; {LARGEST_TEMPLATE} are allowed"
        )
    return given


def _is_default(one: Any) -> bool:
    return isinstance(one, dict) and one.get("name") == "default"


def _special_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """By name; a token is a text, or an object with the text in `content`."""
    found = {}
    for name in _TOKENS:
        named = values.get(name)
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and is_unicode(text) and len(text) <= _LARGEST_TOKEN:
            found[name] = text
    return found
