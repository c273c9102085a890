"""Special tokens before and after a prompt, from the tokenizer's files; config.json is not used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from moe_worker.config.directory import read_json
from moe_worker.config.fields import Fields, is_unicode
from moe_worker.errors import TokenizerError
from moe_worker.reading import present

TOKENIZER_CONFIG = "tokenizer_config.json"
# tokenizer_config.json may hold a chat template and thousands of added tokens.
LARGEST_TOKENIZER_CONFIG = 16 << 20
# An ordinary text: what stands around its tokens is special.
_SAMPLE = "a"


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids before and after those of a text."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    def around(self, ids: list[int]) -> list[int]:
        """`ids` with the special tokens; one that the text already has is not added again."""
        before = () if tuple(ids[: len(self.before)]) == self.before else self.before
        return [*before, *ids, *self.behind]


def special_tokens(directory: Path, inner: tokenizers.Tokenizer) -> SpecialTokens:
    """Special tokens that the post-processor of tokenizer.json adds, as changed by `add_bos_token`.

    As transformers 4 does for the Llama tokenizers that DeepSeek publishes, `add_bos_token` in
    tokenizer_config.json decides whether the begin-of-text token `bos_token` is added. If it is not set, or
    `bos_token` is null, the post-processor alone decides, as in transformers 5.

    Raises TokenizerError.
    """
    template = _of_post_processor(inner)
    path = directory / TOKENIZER_CONFIG
    values = read_json(path, LARGEST_TOKENIZER_CONFIG) if present(path) else {}
    bos = _bos(path, values.get("bos_token"), inner)
    if values.get("add_bos_token") is None or bos is None:
        return template
    rest = template.before[1:] if template.before[:1] == (bos,) else template.before
    adds = Fields(str(path), values).boolean("add_bos_token")
    return SpecialTokens((bos, *rest) if adds else rest, template.behind)


def _of_post_processor(inner: tokenizers.Tokenizer) -> SpecialTokens:
    plain, whole = (inner.encode(_SAMPLE, add_special_tokens=special).ids for special in (False, True))
    added = len(whole) - len(plain)
    start = next((i for i in range(added + 1) if whole[i : i + len(plain)] == plain), 0)
    return SpecialTokens(tuple(whole[:start]), tuple(whole[start + len(plain) :]))


def _bos(path: Path, named: Any, inner: tokenizers.Tokenizer) -> int | None:
    """The id of `bos_token`, which is a text or an object with the text in `content`."""
    text = named.get("content") if isinstance(named, dict) else named
    if text is None:
        return None
    token: int | None = inner.token_to_id(text) if isinstance(text, str) and is_unicode(text) else None
    if token is None:
        raise TokenizerError(
            f"{path}: bos_token is {str(text)[:100]!r}, which tokenizer.json does not have; the files do not "
            "belong together"
        )
    return token
