"""Where everything is: the state directory as the host sees it and as the node sees it, and the cluster's
addresses.

Inside the cluster's mount namespace the state directory also appears at the short, fixed path
`/run/localcluster`, so that configuration files do not depend on the checkout and unix socket paths stay
under the kernel's 108 bytes.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
NODE_STATE = Path("/run/localcluster")

BRIDGE = "cni0"
NODE_NAME = "local"
POD_NETWORK = IPv4Network("10.244.0.0/24")
SERVICE_NETWORK = IPv4Network("10.96.0.0/16")
NODE_ADDRESS = IPv4Address("10.244.0.1")
API_SERVICE_ADDRESS = IPv4Address("10.96.0.1")
DNS_ADDRESS = IPv4Address("10.96.0.10")
API_PORT = 6443
API_ADDRESS = f"{NODE_ADDRESS}:{API_PORT}"
CLUSTER_DOMAIN = "cluster.local"

# What every cluster has: Kubernetes, the runtime's interface definition, and the collector as an image.
TOOLS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kubectl",
    "cri-descriptor",
    "otelcol",
)


@dataclass(frozen=True)
class Layout:
    """The files of one cluster below its state directory `root`."""

    root: Path

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig, for use on the host."""
        return self.root / "kubeconfig"

    @property
    def bin(self) -> Path:
        """Links to the tools (kubectl and the others), for use on the host."""
        return self.root / "bin"

    @property
    def logs(self) -> Path:
        """One log file per component; kept by `down`."""
        return self.root / "logs"

    @property
    def run(self) -> Path:
        """Process record, sockets."""
        return self.root / "run"

    @property
    def node(self) -> Path:
        """What the node's programs write: keys, etcd's data, volumes, containers."""
        return self.root / "node"

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.node / "pki"

    @property
    def record(self) -> Path:
        """JSON: which process is the cluster (host PID, start time) and the API server's port on the host."""
        return self.run / "cluster.json"

    @property
    def settings(self) -> Path:
        """JSON: what `up` was asked for, read by the cluster's own processes."""
        return self.node / "settings.json"

    @property
    def images(self) -> Path:
        """JSON: image names and the environments they stand for; may change while the cluster runs."""
        return self.node / "images.json"

    @property
    def lock(self) -> Path:
        """Held (flock) by `up` and `down` while they work."""
        return self.root / "lock"

    @property
    def control_socket(self) -> Path:
        """The supervisor's socket: status and restarts of components."""
        return self.run / "control.sock"

    @property
    def network_socket(self) -> Path:
        """The network agent's socket: forwards from the host."""
        return self.run / "network.sock"

    @property
    def cri_socket(self) -> Path:
        """The container runtime's socket."""
        return self.run / "cri.sock"

    @property
    def audit_log(self) -> Path:
        """Requests that the API server answered, if that was asked for."""
        return self.logs / "audit.log"

    def log(self, component: str) -> Path:
        """The log file of one component."""
        return self.logs / f"{component}.log"

    def node_kubeconfig(self, identity: str) -> Path:
        """A kubeconfig for one of the cluster's own identities."""
        return self.pki / f"{identity}.kubeconfig"


INSIDE = Layout(NODE_STATE)


def cache_directory() -> Path:
    """The user's cache directory for this project (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-operator"


def needed_paths() -> list[Path]:
    """Directories of the host that every pod must see: the checkout, the Python environment, built tools.

    Sorted so that no path lies inside an earlier one's subdirectory that is listed again.
    """
    wanted = {CHECKOUT, Path(sys.prefix), Path(sys.base_prefix), cache_directory()}
    existing = sorted(path.resolve() for path in wanted if path.exists())
    return [
        path for path in existing if path != Path("/usr") and not any(p in existing for p in path.parents)
    ]
