"""Which directories of nodes a deployment mounts, and whether the administrator allows them.

Whoever may create a MoEDeployment has the operator create its pods. Without a bound, every directory of a
node could be read by an image of the user's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from moe_operator.render import frontend, worker
from moe_operator.resources.deployment import Deployment

_REMEDY = (
    "use hf://, s3://, gs://, pvc:// or oci://, or have the administrator add a root to modelRoots of the "
    "chart (MOE_OPERATOR_MODEL_ROOTS)"
)


def refusal(deployment: Deployment, roots: Sequence[str]) -> str:
    """Why the deployment may not mount what it asks for; empty where it may.

    roots: absolute paths of directories that may be mounted, with all below them.
    """
    paths = [path for template in (worker.rendered(deployment), frontend.rendered(deployment))
             for path in _mounted(template["spec"].get("volumes", ()))]  # fmt: skip
    wrong = next((path for path in paths if not any(_is_below(path, root) for root in roots)), None)
    if wrong is None:
        return ""
    allowed = f"it is below none of {', '.join(roots)}" if roots else "the operator allows none"
    return f"spec mounts a directory of the node that is not allowed: {wrong}: {allowed}; {_REMEDY}"


def _mounted(volumes: Iterable[dict[str, Any]]) -> Iterator[str]:
    for volume in volumes:
        if "hostPath" in volume:
            yield str((volume["hostPath"] or {}).get("path", ""))


def _is_below(path: str, root: str) -> bool:
    parts, above = _parts(path), _parts(root)
    return path.startswith("/") and ".." not in parts and parts[: len(above)] == above


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]
