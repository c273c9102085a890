"""What a frontend tells workers about the client of a request: metadata of the call. Pure.

Workers believe these keys, so only frontends (and the operator) may reach their ports. A frontend never
forwards a client's own values.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

TENANT_KEY: Final = "x-moe-tenant"
"""Name of the tenant; absent: the request has none."""
WEIGHT_KEY: Final = "x-moe-weight"
"""Its share of the machine, relative to other tenants."""
PRIORITY_KEY: Final = "x-moe-priority"
"""Of the request, within the bounds of its tenant."""
SALT_KEY: Final = "x-moe-salt"
"""Separates cached prefixes: requests with different values share none."""
KEYS: Final = frozenset({TENANT_KEY, WEIGHT_KEY, PRIORITY_KEY, SALT_KEY})

WEIGHT_MOST: Final = 1000
PRIORITY_MOST: Final = 9
_FORMS: Final = {
    TENANT_KEY: (re.compile(r"[!-~]{1,253}"), "1 to 253 printable ASCII characters without spaces"),
    WEIGHT_KEY: (re.compile(r"[1-9][0-9]{0,2}|1000"), f"a whole number from 1 to {WEIGHT_MOST}"),
    PRIORITY_KEY: (re.compile(r"[0-9]"), f"a whole number from 0 to {PRIORITY_MOST}"),
    SALT_KEY: (re.compile(r"[0-9a-f]{1,64}"), "1 to 64 hexadecimal digits"),
}


class MalformedTenancyError(ValueError):
    """A value has another form than frontends send.

    Attributes:
        key: of the metadata.
        problem: goes on after its name.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key
        self.problem = problem


@dataclass(frozen=True)
class Tenancy:
    """Whose request it is, and how it is served."""

    tenant: str = ""
    weight: int = 1
    priority: int = 0
    salt: str = ""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """For a worker; nothing for what has its default."""
        given = (
            (TENANT_KEY, self.tenant),
            (WEIGHT_KEY, str(self.weight) if self.weight != 1 else ""),
            (PRIORITY_KEY, str(self.priority) if self.priority else ""),
            (SALT_KEY, self.salt),
        )
        return tuple(pair for pair in given if pair[1])


def tenancy_of(metadata: Iterable[Any] | None) -> Tenancy:
    """What the metadata of a call say; keys are in lower case. Raises MalformedTenancyError."""
    found: dict[str, str] = {}
    for key, value in metadata or ():
        if key not in KEYS:
            continue
        pattern, form = _FORMS[key]
        if key in found or not isinstance(value, str) or not pattern.fullmatch(value):
            raise MalformedTenancyError(key, f"is malformed; send it once, as {form}")
        found[key] = value
    return Tenancy(
        found.get(TENANT_KEY, ""),
        int(found.get(WEIGHT_KEY, "1")),
        int(found.get(PRIORITY_KEY, "0")),
        found.get(SALT_KEY, ""),
    )
