"""Between the messages of the Container Runtime Interface (`pb`) and the runtime's own types."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localcluster.cri.enter import Volume
from localcluster.cri.runtime import Container, ContainerConfig, Sandbox, SandboxConfig
from localcluster.cri.stats import Usage
from localcluster.images import Image, content


def sandbox_config(config: Any) -> SandboxConfig:
    """From PodSandboxConfig."""
    network = config.linux.security_context.namespace_options.network
    return SandboxConfig(config.hostname, network == _NODE, config.log_directory, resolver(config.dns_config))


_NODE = 2  # NamespaceMode.NODE


def resolver(dns: Any) -> str:
    """The content of /etc/resolv.conf from DNSConfig."""
    lines = [f"nameserver {server}" for server in dns.servers]
    if dns.searches:
        lines.append(f"search {' '.join(dns.searches)}")
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    return "".join(f"{line}\n" for line in lines)


def container_config(config: Any, image: Image, known: Mapping[str, Image]) -> ContainerConfig:
    """From the message ContainerConfig. `command` replaces the image's entrypoint, `args` follows either.

    known: the images that volumes may show. Raises ImageError for one that does not exist.
    """
    # Kubernetes passes bytes; this way an environment that is not UTF-8 stays unchanged.
    environment = {e.key: os.fsdecode(e.value) for e in config.envs}
    return ContainerConfig(
        image=image,
        command=(*(config.command or image.entrypoint), *config.args),
        environment=environment,
        directory=config.working_dir,
        volumes=tuple(_volume(mount, known) for mount in config.mounts),
        read_only=config.linux.security_context.readonly_rootfs,
        log_path=config.log_path,
        stop_signal=stop_signal(_stop_signal_name(config)),
    )


def _volume(mount: Any, known: Mapping[str, Image]) -> Volume:
    """From Mount. A volume of an image names the image instead of a directory of the node."""
    if not mount.image.image:
        return Volume(mount.host_path, mount.container_path, mount.readonly)
    return Volume(content(known, mount.image.image, mount.image_sub_path), mount.container_path, True)


def stop_signal(name: str) -> signal.Signals:
    """From a name of the interface's enum Signal; RUNTIME_DEFAULT and names unknown to Python are SIGTERM."""
    return signal.Signals.__members__.get(name, signal.SIGTERM)


def _stop_signal_name(config: Any) -> str:
    kind = config.DESCRIPTOR.fields_by_name["stop_signal"].enum_type
    return str(kind.values_by_number[config.stop_signal].name)


def pod_sandbox(pb: Any, sandbox: Sandbox, config: Any) -> Any:
    """To PodSandbox; `config` is the PodSandboxConfig it was made from."""
    return pb.PodSandbox(
        id=sandbox.id,
        metadata=config.metadata,
        state=_sandbox_state(pb, sandbox),
        created_at=sandbox.created,
        labels=config.labels,
        annotations=config.annotations,
    )


def _sandbox_state(pb: Any, sandbox: Sandbox) -> Any:
    return pb.SANDBOX_READY if sandbox.ready else pb.SANDBOX_NOTREADY


def sandbox_status(pb: Any, sandbox: Sandbox, config: Any) -> Any:
    """To PodSandboxStatus."""
    namespaces = pb.Namespace(options=config.linux.security_context.namespace_options)
    return pb.PodSandboxStatus(
        id=sandbox.id,
        metadata=config.metadata,
        state=_sandbox_state(pb, sandbox),
        created_at=sandbox.created,
        network=pb.PodSandboxNetworkStatus(ip=str(sandbox.namespaces.address) if sandbox.ready else ""),
        linux=pb.LinuxPodSandboxStatus(namespaces=namespaces),
        labels=config.labels,
        annotations=config.annotations,
    )


def container_state(pb: Any, container: Container) -> Any:
    """To ContainerState."""
    if container.finished:
        return pb.CONTAINER_EXITED
    return pb.CONTAINER_RUNNING if container.started else pb.CONTAINER_CREATED


def container_summary(pb: Any, container: Container, config: Any) -> Any:
    """To Container; `config` is the message ContainerConfig it was made from."""
    return pb.Container(
        id=container.id,
        pod_sandbox_id=container.sandbox.id,
        metadata=config.metadata,
        image=config.image,
        image_ref=container.config.image.name,
        image_id=container.config.image.name,
        state=container_state(pb, container),
        created_at=container.created,
        labels=config.labels,
        annotations=config.annotations,
    )


def container_status(pb: Any, container: Container, config: Any) -> Any:
    """To ContainerStatus."""
    return pb.ContainerStatus(
        id=container.id,
        metadata=config.metadata,
        state=container_state(pb, container),
        created_at=container.created,
        started_at=container.started,
        finished_at=container.finished,
        exit_code=container.exit_code,
        image=pb.ImageSpec(image=container.config.image.name),
        image_ref=container.config.image.name,
        image_id=container.config.image.name,
        reason=container.reason,
        message=container.message,
        labels=config.labels,
        annotations=config.annotations,
        mounts=config.mounts,
        log_path=str(Path(container.sandbox.config.log_directory) / container.config.log_path),
    )


def container_stats(pb: Any, container: Container, config: Any, used: Usage) -> Any:
    """To ContainerStats."""
    now = time.time_ns()
    attributes = pb.ContainerAttributes(
        id=container.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
    )
    memory = {
        key: pb.UInt64Value(value=used.resident) for key in ("working_set_bytes", "usage_bytes", "rss_bytes")
    }
    return pb.ContainerStats(
        attributes=attributes,
        cpu=pb.CpuUsage(timestamp=now, usage_core_nano_seconds=pb.UInt64Value(value=used.cpu)),
        memory=pb.MemoryUsage(timestamp=now, **memory),
        writable_layer=filesystem(pb, container.home),
    )


def filesystem(pb: Any, directory: Path) -> Any:
    """To FilesystemUsage. The kubelet does not survive missing numbers here, so both are always set."""
    used = pb.UInt64Value(value=0)
    identifier = pb.FilesystemIdentifier(mountpoint=str(directory))
    return pb.FilesystemUsage(timestamp=time.time_ns(), fs_id=identifier, used_bytes=used, inodes_used=used)


def image(pb: Any, found: Image) -> Any:
    """To Image."""
    return pb.Image(
        id=found.name,
        repo_tags=[found.name],
        size=1,  # the kubelet takes 0 for a broken image
        uid=pb.Int64Value(value=found.user),
        spec=pb.ImageSpec(image=found.name),
    )


def matches(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether an object's labels satisfy a label selector."""
    return all(labels.get(key) == value for key, value in wanted.items())
