"""routing.json: what `moe-worker routing` measured of a checkpoint's routers, and what may be served by it.

    {"text": "valid.txt.zst", "least_mass": 0.75, "masses": [{"mass": 1.0, "bits_per_byte": 1.31, ...}, ...],
     "loads": {"1": [0.03, ...], ...}, "balance": {"margin": 0.1, "nudges": {"1": [0.04, ...], ...}},
     "domains": {"names": ["git", ...], "named": 16, "shares": {"1": [[0.1, ...], ...], ...}}}

`loads` are shares of the tokens that each expert of a layer took; `shares` are those of each domain's.
`nudges`, 0 to `margin`, even out the loads when they are added to the scores by which experts are chosen.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_worker.config.directory import read_json
from moe_worker.config.fields import LARGEST_FLOAT, is_unicode
from moe_worker.config.moe import Routing
from moe_worker.errors import CheckpointError, SettingsError
from moe_worker.reading import present

ROUTING_FILE = "routing.json"
MOST_DOMAINS, LONGEST_DOMAIN = 64, 100


@dataclass(frozen=True)
class KnownDomains:
    """Domains and their affinities: shares of each expert, by layer and domain.

    named: experts of a layer that a domain is said to need.
    """

    names: tuple[str, ...]
    named: int
    shares: dict[int, tuple[tuple[float, ...], ...]]


@dataclass(frozen=True)
class Balance:
    """What evens out the loads within a margin: additions to the scores of each expert, by layer."""

    margin: float
    nudges: dict[int, tuple[float, ...]]


@dataclass(frozen=True)
class RoutingReport:
    """least_mass: the smallest that the report allows. loads: of each expert, by layer."""

    least_mass: float
    loads: dict[int, tuple[float, ...]]
    domains: KnownDomains | None = None
    balance: Balance | None = None


def read_routing_report(checkpoint: Path) -> RoutingReport | None:
    """The checkpoint's report, None where there is none. Raises CheckpointError for an invalid one."""
    path = checkpoint / ROUTING_FILE
    if not present(path):
        return None
    values = read_json(path)
    least: Any = values.get("least_mass")
    loads: Any = values.get("loads", {})
    if not _is_number(least) or not 0 < least <= 1:
        raise CheckpointError(f"{path}: least_mass is not a number above 0, at most 1; write it anew")
    if not isinstance(loads, dict) or not all(map(_is_loads, loads.items())):
        raise CheckpointError(f"{path}: loads is not an object of layers and lists of numbers; write it anew")
    rows = {int(layer): tuple(row) for layer, row in loads.items()}
    return RoutingReport(
        float(least), rows, _domains(path, values.get("domains")), _balance(path, values.get("balance"))
    )


def _balance(path: Path, value: Any) -> Balance | None:
    if value is None:
        return None
    fields = value if isinstance(value, dict) else {}
    margin: Any = fields.get("margin")
    nudges: Any = fields.get("nudges")
    valid = _is_number(margin) and 0 < margin <= 1 and isinstance(nudges, dict)
    if not valid or not all(_is_loads(item) and max(item[1], default=0) <= margin for item in nudges.items()):
        raise CheckpointError(
            f"{path}: balance is not an object of a margin and of nudges within it by layer; write it anew"
        )
    return Balance(float(margin), {int(layer): tuple(row) for layer, row in nudges.items()})


def _domains(path: Path, value: Any) -> KnownDomains | None:
    if value is None:
        return None
    wrong = CheckpointError(
        f"{path}: domains is not an object of names, named and shares that fit together; write it anew"
    )
    if not isinstance(value, dict):
        raise wrong
    names, named, shares = (value.get(key) for key in ("names", "named", "shares"))
    if not isinstance(names, list) or not 1 <= len(names) <= MOST_DOMAINS or not isinstance(shares, dict):
        raise wrong
    tables = [table for table in shares.values() if isinstance(table, list) and len(table) == len(names)]
    sizes = {len(row) if _is_loads(("0", row)) else 0 for table in tables for row in table}
    known = all(isinstance(name, str) and len(name) <= LONGEST_DOMAIN and is_unicode(name) for name in names)
    if not (shares and len(tables) == len(shares) and len(sizes) == 1 and known and isinstance(named, int)):
        raise wrong
    if not 1 <= named <= min(sizes) or not all(layer.isdecimal() and len(layer) < 6 for layer in shares):
        raise wrong
    return KnownDomains(
        tuple(names), named, {int(layer): tuple(map(tuple, table)) for layer, table in shares.items()}
    )


def check_mass(mass: float, routing: Routing, report: RoutingReport | None) -> None:
    """Raises SettingsError for less mass than config.json has, unless the report allows it."""
    least = routing.mass if report is None else min(routing.mass, report.least_mass)
    if mass < least:
        why = (
            f"the checkpoint has no {ROUTING_FILE} that allows less, which `moe-worker routing` writes"
            if report is None
            else f"its {ROUTING_FILE} allows no less"
        )
        raise SettingsError(f"routing_mass is {mass:g}; it must be from {least:g} to 1: {why}")


def _is_loads(item: tuple[str, Any]) -> bool:
    layer, row = item
    numbers = isinstance(row, list) and all(_is_number(value) and value >= 0 for value in row)
    return layer.isdecimal() and len(layer) < 6 and numbers


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST_FLOAT  # nor NaN
