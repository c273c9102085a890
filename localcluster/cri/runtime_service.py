"""The interface's RuntimeService: passes the kubelet's requests about pods and containers to the runtime."""

from __future__ import annotations

import asyncio
from typing import Any

from localcluster import images
from localcluster.cri import convert, process, stats
from localcluster.cri.interface import Method
from localcluster.cri.runtime import Container, NoSuchObjectError, Runtime, Sandbox
from localcluster.errors import LocalClusterError

_STREAMING = (
    "the local cluster's runtime has no {what}: containers here are processes of this machine. "
    "Use `kubectl logs`, or `python -m localcluster forward NAMESPACE/SERVICE:PORT` to reach a service"
)


class NotHereError(LocalClusterError):
    """The interface has such a call, this runtime does not."""


class CommandTimeoutError(LocalClusterError):
    """A command executed in a container took too long."""


class RuntimeService:
    """Pods and containers. Every public coroutine is a method of the interface: request message in, response
    out.
    """

    def __init__(self, runtime: Runtime, pb: Any) -> None:
        """`pb` holds the interface's messages."""
        self._runtime, self._pb = runtime, pb
        # The messages that objects were made from: their labels and names are given back in every answer.
        self._pods: dict[str, Any] = {}
        self._configs: dict[str, Any] = {}

    def methods(self) -> dict[str, Method]:
        """The implemented methods by the interface's names."""
        return {
            "Version": self.version,
            "Status": self.status,
            "RuntimeConfig": self.runtime_config,
            "UpdateRuntimeConfig": self.update_runtime_config,
            "RunPodSandbox": self.run_pod_sandbox,
            "StopPodSandbox": self.stop_pod_sandbox,
            "RemovePodSandbox": self.remove_pod_sandbox,
            "PodSandboxStatus": self.pod_sandbox_status,
            "ListPodSandbox": self.list_pod_sandbox,
            "CreateContainer": self.create_container,
            "StartContainer": self.start_container,
            "StopContainer": self.stop_container,
            "RemoveContainer": self.remove_container,
            "ListContainers": self.list_containers,
            "ContainerStatus": self.container_status,
            "UpdateContainerResources": self.update_container_resources,
            "ReopenContainerLog": self.reopen_container_log,
            "ExecSync": self.exec_sync,
            "Exec": self.refuse_exec,
            "Attach": self.refuse_attach,
            "PortForward": self.refuse_port_forward,
            "ContainerStats": self.container_stats,
            "ListContainerStats": self.list_container_stats,
            "PodSandboxStats": self.pod_sandbox_stats,
            "ListPodSandboxStats": self.list_pod_sandbox_stats,
        }

    async def version(self, _: Any) -> Any:
        """Who answers."""
        names = {"runtime_name": "localcluster", "runtime_version": "1.0.0", "runtime_api_version": "v1"}
        return self._pb.VersionResponse(version="0.1.0", **names)

    async def status(self, _: Any) -> Any:
        """Ready from the start."""
        conditions = [
            self._pb.RuntimeCondition(type=t, status=True) for t in ("RuntimeReady", "NetworkReady")
        ]
        return self._pb.StatusResponse(status=self._pb.RuntimeStatus(conditions=conditions))

    async def runtime_config(self, _: Any) -> Any:
        """The cgroup driver, which nothing here uses."""
        return self._pb.RuntimeConfigResponse(
            linux=self._pb.LinuxRuntimeConfiguration(cgroup_driver=self._pb.CGROUPFS)
        )

    async def update_runtime_config(self, _: Any) -> Any:
        """Takes note of nothing: the pod network is fixed."""
        return self._pb.UpdateRuntimeConfigResponse()

    async def run_pod_sandbox(self, request: Any) -> Any:
        """Makes a pod's namespaces."""
        sandbox = self._runtime.run_sandbox(convert.sandbox_config(request.config))
        self._pods[sandbox.id] = request.config
        return self._pb.RunPodSandboxResponse(pod_sandbox_id=sandbox.id)

    async def stop_pod_sandbox(self, request: Any) -> Any:
        """Idempotent, also for a sandbox long gone."""
        if request.pod_sandbox_id in self._runtime.sandboxes:
            await self._runtime.stop_sandbox(self._runtime.get_sandbox(request.pod_sandbox_id))
        return self._pb.StopPodSandboxResponse()

    async def remove_pod_sandbox(self, request: Any) -> Any:
        """Idempotent, also for a sandbox long gone."""
        if request.pod_sandbox_id in self._runtime.sandboxes:
            sandbox = self._runtime.get_sandbox(request.pod_sandbox_id)
            for container in self._runtime.containers_of(sandbox):
                self._configs.pop(container.id, None)
            await self._runtime.remove_sandbox(sandbox)
            self._pods.pop(sandbox.id, None)
        return self._pb.RemovePodSandboxResponse()

    async def pod_sandbox_status(self, request: Any) -> Any:
        """One sandbox in full."""
        sandbox = self._runtime.get_sandbox(request.pod_sandbox_id)
        return self._pb.PodSandboxStatusResponse(
            status=convert.sandbox_status(self._pb, sandbox, self._pods[sandbox.id])
        )

    async def list_pod_sandbox(self, request: Any) -> Any:
        """Sandboxes by id, state and labels."""
        found = [
            convert.pod_sandbox(self._pb, s, self._pods[s.id]) for s in list(self._runtime.sandboxes.values())
        ]
        wanted = request.filter
        kept = [
            s
            for s in found
            if s.id.startswith(wanted.id) and convert.matches(wanted.label_selector, s.labels)
        ]
        if wanted.HasField("state"):
            kept = [s for s in kept if s.state == wanted.state.state]
        return self._pb.ListPodSandboxResponse(items=kept)

    async def create_container(self, request: Any) -> Any:
        """Checks that the container could start."""
        sandbox = self._runtime.get_sandbox(request.pod_sandbox_id)
        known = self._runtime.images()
        image = images.find(known, request.config.image.image)
        container = self._runtime.create(sandbox, convert.container_config(request.config, image, known))
        self._configs[container.id] = request.config
        return self._pb.CreateContainerResponse(container_id=container.id)

    async def start_container(self, request: Any) -> Any:
        """Starts the process."""
        await self._runtime.start(self._runtime.get_container(request.container_id))
        return self._pb.StartContainerResponse()

    async def stop_container(self, request: Any) -> Any:
        """Asks the process to end, and kills it after the grace period."""
        if request.container_id in self._runtime.containers:
            await self._runtime.stop(self._runtime.get_container(request.container_id), request.timeout)
        return self._pb.StopContainerResponse()

    async def remove_container(self, request: Any) -> Any:
        """Idempotent, also for a container long gone."""
        if request.container_id in self._runtime.containers:
            await self._runtime.remove(self._runtime.get_container(request.container_id))
            self._configs.pop(request.container_id, None)
        return self._pb.RemoveContainerResponse()

    async def list_containers(self, request: Any) -> Any:
        """Containers by id, sandbox, state and labels."""
        found = [
            convert.container_summary(self._pb, c, self._configs[c.id])
            for c in self._selected(request.filter)
        ]
        if request.filter.HasField("state"):
            found = [c for c in found if c.state == request.filter.state.state]
        return self._pb.ListContainersResponse(containers=found)

    def _selected(self, wanted: Any) -> list[Container]:
        return [
            c
            for c in list(self._runtime.containers.values())
            if c.id.startswith(wanted.id)
            and wanted.pod_sandbox_id in ("", c.sandbox.id)
            and convert.matches(wanted.label_selector, self._configs[c.id].labels)
        ]

    async def container_status(self, request: Any) -> Any:
        """One container in full."""
        container = self._runtime.get_container(request.container_id)
        return self._pb.ContainerStatusResponse(
            status=convert.container_status(self._pb, container, self._configs[container.id])
        )

    async def update_container_resources(self, _: Any) -> Any:
        """Accepts everything: resources are scheduled by, but not enforced."""
        return self._pb.UpdateContainerResourcesResponse()

    async def reopen_container_log(self, request: Any) -> Any:
        """After the kubelet has rotated a log."""
        log = self._runtime.get_container(request.container_id).log
        if log is not None:
            log.reopen()
        return self._pb.ReopenContainerLogResponse()

    async def exec_sync(self, request: Any) -> Any:
        """Executes a probe or hook in a container."""
        container = self._runtime.get_container(request.container_id)
        if not container.running:
            raise NoSuchObjectError(f"container {container.id} is not running")
        environment = self._runtime.environment(container)
        finished = await process.execute(container.pid, request.cmd, environment, request.timeout)
        if finished is None:
            raise CommandTimeoutError(f"{request.cmd[0]} took more than {request.timeout} s")
        return self._pb.ExecSyncResponse(
            stdout=finished.stdout, stderr=finished.stderr, exit_code=finished.exit_code
        )

    async def refuse_exec(self, _: Any) -> Any:
        """`kubectl exec`."""
        raise NotHereError(_STREAMING.format(what="exec"))

    async def refuse_attach(self, _: Any) -> Any:
        """`kubectl attach`."""
        raise NotHereError(_STREAMING.format(what="attach"))

    async def refuse_port_forward(self, _: Any) -> Any:
        """`kubectl port-forward`."""
        raise NotHereError(_STREAMING.format(what="port forwarding"))

    async def _stats(self, container: Container) -> Any:
        used = await asyncio.to_thread(stats.usage, container.pid) if container.running else stats.Usage()
        return convert.container_stats(self._pb, container, self._configs[container.id], used)

    async def container_stats(self, request: Any) -> Any:
        """What one container uses."""
        container = self._runtime.get_container(request.container_id)
        return self._pb.ContainerStatsResponse(stats=await self._stats(container))

    async def list_container_stats(self, request: Any) -> Any:
        """What containers use."""
        selected = self._selected(request.filter)
        return self._pb.ListContainerStatsResponse(
            stats=[await self._stats(c) for c in selected if c.running]
        )

    async def _pod_stats(self, sandbox: Sandbox) -> Any:
        config = self._pods[sandbox.id]
        attributes = self._pb.PodSandboxAttributes(
            id=sandbox.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
        )
        containers = [await self._stats(c) for c in self._runtime.containers_of(sandbox) if c.running]
        return self._pb.PodSandboxStats(
            attributes=attributes, linux=self._pb.LinuxPodSandboxStats(containers=containers)
        )

    async def pod_sandbox_stats(self, request: Any) -> Any:
        """What one pod uses."""
        sandbox = self._runtime.get_sandbox(request.pod_sandbox_id)
        return self._pb.PodSandboxStatsResponse(stats=await self._pod_stats(sandbox))

    async def list_pod_sandbox_stats(self, request: Any) -> Any:
        """What pods use."""
        wanted = request.filter
        found = [
            await self._pod_stats(s)
            for s in list(self._runtime.sandboxes.values())
            if s.id.startswith(wanted.id) and convert.matches(wanted.label_selector, self._pods[s.id].labels)
        ]
        return self._pb.ListPodSandboxStatsResponse(stats=found)
