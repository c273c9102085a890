"""What the CRDs of Kubernetes' SIGs that the tests write down have in common."""

from __future__ import annotations

from typing import Any


def published(
    kind: str, group: str, approved: str, spec: dict[str, Any], *, short_names: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A namespaced CRD with version v1 and a status that is left open, because the operator never writes it.

    approved: the pull request that approved the API; groups under k8s.io need it.
    """
    singular = kind.lower()
    plural = f"{singular}s"
    schema = {
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        },
    }
    version = {"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            "annotations": {"api-approved.kubernetes.io": f"https://github.com/kubernetes-sigs/{approved}"},
        },
        "spec": {
            "group": group,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": singular,
                "shortNames": [*short_names],
            },
            "scope": "Namespaced",
            "versions": [version | {"schema": {"openAPIV3Schema": schema}}],
        },
    }
