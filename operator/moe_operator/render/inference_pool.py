"""InferencePool of the Gateway API Inference Extension: the frontends as backends of an HTTPRoute.

Each frontend is a model server as its model server protocol says: it speaks OpenAI's API, and /metrics has
the gauges that an endpoint picker reads. https://gateway-api-inference-extension.sigs.k8s.io/reference/spec
"""

from __future__ import annotations

from moe_operator.render.objects import Manifest, child
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment
from moe_operator.resources.frontend_spec import Frontend

ENGINE = names.FIELD_MANAGER
"""Name of this model server in the configuration of endpoint pickers, which maps it to names of metrics."""


def pools(of: Deployment) -> list[Manifest]:
    """The pool of a deployment; none unless it asks for one."""
    pool = of.spec.frontend.inference_pool
    if pool is None:
        return []
    name, picker = names.frontend(of.name), pool.endpoint_picker
    manifest = child(
        of.identity, names.INFERENCE_POOL_API_VERSION, names.INFERENCE_POOL_KIND, name, names.ROLE_FRONTEND
    )
    manifest["spec"] = {
        "selector": {"matchLabels": names.frontend_labels(of.name)},
        "targetPorts": [{"number": names.HTTP_PORT}],
        "endpointPickerRef": {
            "group": "",
            "kind": "Service",
            "name": picker.name,
            "port": {"number": picker.port},
            "failureMode": picker.failure_mode,
        },
    }
    return [manifest]


def pod_labels(settings: Frontend) -> dict[str, str]:
    """Labels that tell endpoint pickers what kind of model server a pod of the pool is."""
    return {} if settings.inference_pool is None else dict.fromkeys(names.ENGINE_LABELS, ENGINE)
