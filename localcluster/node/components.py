"""The Kubernetes components: command lines, configuration files and how to tell that each is ready.

Paths are the node's (`layout.INSIDE`). Ports are the upstream defaults: nothing but the cluster is in its
network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localcluster.layout import (
    API_PORT,
    CHECKOUT,
    CLUSTER_DOMAIN,
    DNS_ADDRESS,
    INSIDE,
    NODE_ADDRESS,
    NODE_NAME,
    SERVICE_NETWORK,
)

ETCD_URL = "http://127.0.0.1:2379"
KUBELET_DIRECTORY = INSIDE.node / "kubelet"
KUBELET_CONFIGURATION = INSIDE.node / "kubelet.json"
_PKI = INSIDE.pki
_AUDIT_POLICY = INSIDE.node / "audit-policy.json"


@dataclass(frozen=True)
class Component:
    """A program that the supervisor starts and keeps running.

    Attributes:
        name: also of its log file.
        command: executable and arguments.
        ready: a URL that returns 200, or the path of a unix socket that accepts, once the component is ready.
        environment: additional variables.
        inherit_listener: whether it gets the API server's host listener as file descriptor 3.
    """

    name: str
    command: tuple[str, ...]
    ready: str | Path
    environment: Mapping[str, str] = field(default_factory=dict)
    inherit_listener: bool = False


def _flags(**values: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={_text(value)}" for name, value in values.items()]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def etcd(tools: Mapping[str, Path]) -> Component:
    """The store. `unsafe-no-fsync`: the data does not outlive the cluster, so waiting for the disk buys
    nothing.
    """
    flags = _flags(
        name="local",
        data_dir=INSIDE.node / "etcd",
        listen_client_urls=ETCD_URL,
        advertise_client_urls=ETCD_URL,
        listen_peer_urls="http://127.0.0.1:2380",
        unsafe_no_fsync=True,
        log_level="warn",
    )
    return Component("etcd", (str(tools["etcd"]), *flags), f"{ETCD_URL}/readyz")


def api_server(tools: Mapping[str, Path], *, audit: bool = False) -> Component:
    """The API server, with the Node and RBAC authorizers; with `audit`, it logs who requested what."""
    flags = _flags(
        etcd_servers=ETCD_URL,
        bind_address=NODE_ADDRESS,
        advertise_address=NODE_ADDRESS,
        secure_port=API_PORT,
        service_cluster_ip_range=SERVICE_NETWORK,
        authorization_mode="Node,RBAC",
        enable_admission_plugins="NodeRestriction,OwnerReferencesPermissionEnforcement",
        allow_privileged=True,
        client_ca_file=_PKI / "ca.crt",
        tls_cert_file=_PKI / "apiserver.crt",
        tls_private_key_file=_PKI / "apiserver.key",
        kubelet_certificate_authority=_PKI / "ca.crt",
        kubelet_client_certificate=_PKI / "apiserver-kubelet.crt",
        kubelet_client_key=_PKI / "apiserver-kubelet.key",
        kubelet_preferred_address_types="InternalIP",
        service_account_issuer=f"https://kubernetes.default.svc.{CLUSTER_DOMAIN}",
        service_account_key_file=_PKI / "service-account.pub",
        service_account_signing_key_file=_PKI / "service-account.key",
        profiling=False,
    )
    if audit:
        flags += _flags(audit_policy_file=_AUDIT_POLICY, audit_log_path=INSIDE.audit_log)
    return Component(
        "kube-apiserver", (str(tools["kube-apiserver"]), *flags), f"https://{NODE_ADDRESS}:{API_PORT}/readyz"
    )


def write_audit_policy() -> None:
    """Writes the audit policy: who asked for what, without bodies; a watch at its begin and its end."""
    policy = {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata"}],
    }
    _AUDIT_POLICY.write_text(json.dumps(policy))


def controller_manager(tools: Mapping[str, Path]) -> Component:
    """All controllers, each under its own service account."""
    config = INSIDE.node_kubeconfig("controller-manager")
    flags = _flags(
        kubeconfig=config,
        authentication_kubeconfig=config,
        authorization_kubeconfig=config,
        service_account_private_key_file=_PKI / "service-account.key",
        root_ca_file=_PKI / "ca.crt",
        use_service_account_credentials=True,
        # Each of its 40 controllers begins by making its account; at the default 20 requests a second that
        # takes 4 s.
        kube_api_qps=500,
        kube_api_burst=1000,
        # Nobody who tries autoscaling here waits 15 s to see it.
        horizontal_pod_autoscaler_sync_period="3s",
        leader_elect=False,
        allocate_node_cidrs=False,
        bind_address="127.0.0.1",
        profiling=False,
    )
    name = "kube-controller-manager"
    return Component(name, (str(tools[name]), *flags), "https://127.0.0.1:10257/healthz")


def scheduler(tools: Mapping[str, Path]) -> Component:
    """The default scheduler."""
    config = INSIDE.node_kubeconfig("scheduler")
    flags = _flags(
        kubeconfig=config,
        authentication_kubeconfig=config,
        authorization_kubeconfig=config,
        leader_elect=False,
        bind_address="127.0.0.1",
        profiling=False,
    )
    return Component(
        "kube-scheduler", (str(tools["kube-scheduler"]), *flags), "https://127.0.0.1:10259/healthz"
    )


def kubelet(tools: Mapping[str, Path]) -> Component:
    """The kubelet; its configuration file is `kubelet_configuration`."""
    flags = _flags(
        config=KUBELET_CONFIGURATION,
        kubeconfig=INSIDE.node_kubeconfig("kubelet"),
        hostname_override=NODE_NAME,
        node_ip=NODE_ADDRESS,
        root_dir=KUBELET_DIRECTORY,
        cert_dir=KUBELET_DIRECTORY / "pki",
    )
    return Component("kubelet", (str(tools["kubelet"]), *flags), "http://127.0.0.1:10248/healthz")


def kubelet_configuration() -> dict[str, Any]:
    """A KubeletConfiguration for a node without cgroups whose images are directories of the machine.

    Eviction and image collection are off: the disk is the developer's, and nothing could be collected.
    """
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{INSIDE.cri_socket}",
        "address": str(NODE_ADDRESS),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(_PKI / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(_PKI / "kubelet-server.crt"),
        "tlsPrivateKeyFile": str(_PKI / "kubelet-server.key"),
        "clusterDNS": [str(DNS_ADDRESS)],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": "",
        "failCgroupV1": False,
        "failSwapOn": False,
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "localStorageCapacityIsolation": False,
        "featureGates": {"KubeletInUserNamespace": True, "InPlacePodLevelResourcesVerticalScaling": False},
        "evictionHard": {
            "memory.available": "0%",
            "nodefs.available": "0%",
            "nodefs.inodesFree": "0%",
            "imagefs.available": "0%",
            "imagefs.inodesFree": "0%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "podLogsDir": str(INSIDE.node / "pod-logs"),
        "volumePluginDir": str(KUBELET_DIRECTORY / "volume-plugins"),
        "registerWithTaints": [],
    }


def write_kubelet_configuration() -> None:
    """Writes the kubelet's configuration file (JSON, which is YAML too)."""
    KUBELET_CONFIGURATION.write_text(json.dumps(kubelet_configuration(), indent=1))


def runtime() -> Component:
    """The process runtime."""
    command = (sys.executable, "-m", "localcluster.cri.server")
    return Component("runtime", command, INSIDE.cri_socket, {"PYTHONPATH": str(CHECKOUT)})


def network_agent() -> Component:
    """DNS, service addresses and the relays to the host."""
    command = (sys.executable, "-m", "localcluster.network.agent")
    environment = {"PYTHONPATH": str(CHECKOUT)}
    return Component("network-agent", command, INSIDE.network_socket, environment, inherit_listener=True)
