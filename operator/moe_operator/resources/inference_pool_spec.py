"""User input: the frontends as backends of an inference gateway (spec.frontend.inferencePool)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_operator.resources.base import Model, number_between, object_name, rules


class EndpointPicker(Model):
    """The endpoint picker, which the user deploys: it chooses a frontend for each request of the gateway."""

    name: str = Field(
        description="Service of the endpoint picker, in the same namespace. Required.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(object_name("this is the name of a Service in the same namespace")),
    )
    port: int = Field(
        default=9002,
        description="Port of that Service on which the endpoint picker serves external processing (gRPC). "
        "Default: 9002.",
        json_schema_extra=rules(number_between("port is a number", 1, 65535)),
    )
    failure_mode: Literal["FailClose", "FailOpen"] = Field(
        default="FailClose",
        description="What the gateway does while the endpoint picker does not respond. FailClose: refuses "
        "requests. FailOpen: sends them to any frontend. Default: FailClose.",
    )


class InferencePool(Model):
    """An InferencePool (inference.networking.k8s.io/v1) of the deployment's frontends."""

    endpoint_picker: EndpointPicker = Field(description="The endpoint picker of the pool. Required.")
