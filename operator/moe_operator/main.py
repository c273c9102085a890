"""The operator's entry point: `kopf run -m moe_operator.main --all-namespaces`."""

from __future__ import annotations

import kopf

from moe_operator.handlers.registration import register
from moe_operator.settings import from_environment

register(kopf.get_default_registry(), from_environment())
