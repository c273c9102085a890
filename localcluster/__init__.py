"""A real Kubernetes on this machine without containers: `python -m localcluster --help`.

For Python: `localcluster.Cluster` and `localcluster.Forward`. They are imported on first use (PEP 562): the
program that enters a container's namespaces is a part of this package, and must start in milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localcluster.cluster import Cluster
    from localcluster.forward import Forward

__all__ = ["Cluster", "Forward"]


def __getattr__(name: str) -> object:
    if name == "Cluster":
        from localcluster.cluster import Cluster  # noqa: PLC0415 - see above

        return Cluster
    if name == "Forward":
        from localcluster.forward import Forward  # noqa: PLC0415

        return Forward
    raise AttributeError(f"module 'localcluster' has no attribute {name!r}")
