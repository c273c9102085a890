"""Admits requests within the limits of their tenants, and measures what tenants use."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from opentelemetry import metrics

from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2
from moe_api.rich_status import FieldViolation
from moe_api.tenancy import Tenancy
from moe_frontend.policy.costs import cost_of
from moe_frontend.policy.tenants import Directory, Refusal, TenantsConfig, Use

_UNLIMITED: Final = (inference_pb2.GetModelRequest,)
ANONYMOUS: Final = "anonymous"


class RefusedRequestError(Exception):
    """A request is not admitted.

    Attributes:
        status: for the client.
    """

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


@dataclass
class Admitted:
    """A request in progress.

    Attributes:
        use: of its tenant.
        tenancy: for workers.
        tokens: that it may use at most, as far as is known; 0: it generates none.
    """

    use: Use
    tenancy: Tenancy
    tokens: int = 0

    @property
    def label(self) -> str:
        """The tenant in metrics: of bounded number."""
        return self.use.label if self.use.tenant else ANONYMOUS


class Admission:
    """The limits of tenants, applied. Belongs to one event loop.

    Args:
        config: of the tenants.
        clock: seconds, monotonic.
    """

    def __init__(
        self, config: TenantsConfig | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = Directory(config or TenantsConfig())
        self._clock = clock
        self._in_progress: Counter[str] = Counter()
        self._requests: metrics.Counter | None = None
        self._tokens: metrics.Counter | None = None

    @contextlib.contextmanager
    def admit(self, tenant: str, salt: str, request: Message) -> Iterator[Admitted]:
        """Counts a request for the time of the block.

        Args:
            tenant: whose it is; "" if the caller is not known.
            salt: of its cached prefixes.
            request: of any method.

        Raises:
            RefusedRequestError: it is beyond a limit of its tenant.
        """
        use = self._directory.of(tenant, self._clock())
        weight = use.allowed.weight
        if isinstance(request, _UNLIMITED):
            yield Admitted(use, Tenancy(tenant, weight, salt=salt))
            return
        admitted = Admitted(use, Tenancy(tenant, weight, _priority(request, use), salt), cost_of(request))
        refusal = use.enter(self._clock(), admitted.tokens)
        self._note(admitted, refusal)
        if refusal is not None:
            raise RefusedRequestError(_status(refusal))
        self._in_progress[admitted.label] += 1
        try:
            yield admitted
        finally:
            self._in_progress[admitted.label] -= 1
            use.leave()
            use.spend(-admitted.tokens, self._clock())

    def spend(self, admitted: Admitted, tokens: int) -> None:
        """Counts tokens that a request has used, also after its end: others may share its computation."""
        admitted.use.spend(tokens, self._clock())
        if self._tokens is not None and tokens:
            self._tokens.add(tokens, {"tenant": admitted.label})

    def measure(self, meter: metrics.Meter) -> None:
        """Creates the instruments; tenants without a class of their own are counted together."""
        self._requests = meter.create_counter(
            "moe_frontend.tenant.requests",
            "{request}",
            "Requests by tenant and result: admitted, or the limit that was reached",
        )
        self._tokens = meter.create_counter(
            "moe_frontend.tenant.tokens", "{token}", "Tokens of prompts and texts by tenant"
        )
        meter.create_observable_up_down_counter(
            "moe_frontend.tenant.requests.active",
            [self._observe],
            "{request}",
            "Requests in progress by tenant",
        )

    def _observe(self, _: metrics.CallbackOptions) -> Sequence[metrics.Observation]:
        return [metrics.Observation(n, {"tenant": label}) for label, n in list(self._in_progress.items())]

    def _note(self, admitted: Admitted, refusal: Refusal | None) -> None:
        if self._requests is not None:
            result = "admitted" if refusal is None else refusal.limit
            self._requests.add(1, {"tenant": admitted.label, "result": result})


def _priority(request: Message, use: Use) -> int:
    """The priority of a request. Raises RefusedRequestError: it is above its tenant's."""
    most = use.allowed.priority
    if not isinstance(request, inference_pb2.GenerateRequest) or not request.HasField("priority"):
        return most
    if request.priority > most:
        wrong = (
            f"is {request.priority}; your tenant may use 0 to {most}"
            if most
            else (f"is {request.priority}; your tenant may use 0 only")
        )
        raise RefusedRequestError(rich_status.invalid_argument([FieldViolation("priority", wrong)]))
    return request.priority


def _status(refusal: Refusal) -> status_pb2.Status:
    return rich_status.retry_later(
        grpc.StatusCode.RESOURCE_EXHAUSTED, refusal.sentence, refusal.retry_s, rich_status.TENANT_LIMIT
    )
