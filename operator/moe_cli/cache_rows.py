"""The rows of `moe status NAME` about caches. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_MIB = 2**20


def rows(sums: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """(heading, text) for each cache that was used; `sums`: as `moe_operator.resources.cache_sums.total`."""
    prompt, cached = sums.get("promptTokens", 0), sums.get("cachedPromptTokens", 0)
    if prompt:
        yield "Prefix cache", f"{_share(cached, prompt)} of {prompt:,} prompt tokens were cached"
    hits = sums.get("outputHits", 0) + sums.get("outputShared", 0)
    lookups = hits + sums.get("outputMisses", 0)
    if lookups:
        yield "Output cache", f"{_share(hits, lookups)} of {lookups:,} cacheable requests {_saved(sums)}"


def _saved(sums: Mapping[str, int]) -> str:
    tokens, seconds = sums.get("savedTokens", 0), sums.get("savedMilliseconds", 0) / 1000
    size, evictions = sums.get("outputBytes", 0) / _MIB, sums.get("outputEvictions", 0)
    return (
        f"needed no worker, which saved {tokens:,} tokens and {seconds:,.1f} s; "
        f"{size:.1f} MiB, {evictions:,} evictions"
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"
