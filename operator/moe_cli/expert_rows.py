"""The use of experts, as `moe status NAME` shows it. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from moe_api.visible import one_line
from moe_api.worker.v1 import worker_pb2

LONGEST_NAME: Final = 40
_DOMAINS_SHOWN: Final = 4
_EXPERTS_OF_A_DOMAIN: Final = 3


def utilisation(tokens: Sequence[int]) -> float | None:
    """The mean load of a layer's experts over the largest one; None where none had a token."""
    most = max(tokens, default=0)
    return sum(tokens) / len(tokens) / most if most else None


def figures(load: worker_pb2.ExpertLoad) -> dict[str, Any] | None:
    """The expert load of one replica as JSON values; None if it has no experts, or has computed nothing.

    `activated` is the mean number of routed experts of a token and layer, at most `most` (None from workers
    that do not report it); `utilisation` is the mean of the layers, `lowest` the worst one.
    """
    layers = [(even, layer) for layer in load.layers if (even := utilisation(layer.tokens)) is not None]
    if not layers:
        return None
    least, worst = min(layers, key=lambda each: each[0])
    choices = sum(sum(layer.tokens) for _, layer in layers) / len(layers)
    return {
        "steps": load.steps,
        "activated": round(choices / load.tokens, 2) if load.tokens else None,
        "most": load.experts_per_token or None,
        "utilisation": round(sum(even for even, _ in layers) / len(layers), 3),
        "lowest": {"layer": worst.layer, "utilisation": round(least, 3)},
        "domains": [_domain(load, domain) for domain in load.domains],
        "fit": round(load.fit, 3) if load.HasField("fit") else None,
    }


def rows(experts: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """(heading, text), a line for each replica; nothing of a model without experts.

    experts: `replicas`, each with its `worker` and either `figures` or a `problem`, and how many are `ready`.
    """
    if experts is None:
        return
    replicas = experts["replicas"]
    lines = [f"{replica['worker']}: {replica.get('problem') or _used(replica)}" for replica in replicas]
    if experts["ready"] > len(replicas):
        lines.append(f"{len(replicas)} of {experts['ready']} replicas were asked")
    yield "Experts", "\n".join(lines)


def _domain(load: worker_pb2.ExpertLoad, domain: worker_pb2.ExpertDomain) -> dict[str, Any]:
    """A domain with the experts of all layers that get most of its choices."""
    shares = (
        (share, -layer.layer, -expert)
        for layer, row in zip(load.layers, domain.shares, strict=False)
        for expert, share in enumerate(row.experts)
        if 0 < share <= 1
    )
    top = heapq.nlargest(_EXPERTS_OF_A_DOMAIN, shares)
    experts = [{"layer": -layer, "expert": -expert, "share": round(share, 3)} for share, layer, expert in top]
    return {"name": one_line(domain.name, LONGEST_NAME), "tokens": domain.tokens, "experts": experts}


def _used(found: Mapping[str, Any]) -> str:
    most, lowest = found["most"], found["lowest"]
    activated = (
        "" if found["activated"] is None else f"{found['activated']:.1f} of {most} activated a token, "
    )
    worst = f"lowest {lowest['utilisation']:.0%} in layer {lowest['layer']}"
    even = f"utilisation {found['utilisation']:.0%} ({worst})"
    return f"{activated}{even}{_domains(found['domains'], found['fit'])}"


def _domains(domains: Sequence[Mapping[str, Any]], fit: float | None) -> str:
    if not domains:
        return ""
    shown = sorted(domains, key=lambda domain: -domain["tokens"])[:_DOMAINS_SHOWN]
    texts = [f"{domain['name']}: {' '.join(map(_place, domain['experts'])) or 'none'}" for domain in shown]
    more = len(domains) - len(shown)
    rest = f", and {more} more" if more else ""
    known = "unknown yet" if fit is None else f"{fit:.0%}"
    return f"; domains (layer/expert): {', '.join(texts)}{rest}; fit {known}"


def _place(expert: Mapping[str, Any]) -> str:
    return f"{expert['layer']}/{expert['expert']}"
