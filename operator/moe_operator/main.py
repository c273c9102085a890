"""What kopf loads: the operator's handlers (`python -m moe_operator`)."""

from __future__ import annotations

import kopf

from moe_api.visible import guard_logs
from moe_operator.controller.registration import register
from moe_operator.settings import from_environment

guard_logs()
register(kopf.get_default_registry(), from_environment())
