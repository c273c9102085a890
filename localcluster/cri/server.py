"""The process runtime's gRPC face: RuntimeService and ImageService of the Container Runtime Interface, v1.

Served on a unix socket to the kubelet. What is not implemented answers UNIMPLEMENTED with a sentence (Exec,
Attach, PortForward) or by gRPC itself (events, checkpoints, metrics), and the kubelet then does without.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from localcluster import images, linux
from localcluster.cri import convert, process, stats, stubs
from localcluster.cri.runtime import CannotStartError, Container, NoSuchObjectError, Runtime, Sandbox
from localcluster.errors import ImageError
from localcluster.layout import INSIDE
from localcluster.settings import read_settings

pb: Any = importlib.import_module(stubs.MESSAGES)
pb_grpc: Any = importlib.import_module(stubs.SERVICES)

_Method = Callable[[Any, Any, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[Any]]
_CODES: dict[type[Exception], grpc.StatusCode] = {
    NoSuchObjectError: grpc.StatusCode.NOT_FOUND,
    ImageError: grpc.StatusCode.NOT_FOUND,
    CannotStartError: grpc.StatusCode.UNKNOWN,
    OSError: grpc.StatusCode.INTERNAL,
}
_STREAMING = (
    "the local cluster's runtime has no {what}: containers here are processes of this machine. "
    "Use `kubectl logs`, or `python -m localcluster forward NAMESPACE/SERVICE:PORT` to reach a service"
)


def _answer(method: _Method) -> _Method:
    """Turns the runtime's errors into gRPC status codes with their message."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await method(self, request, context)
        except tuple(_CODES) as error:
            code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
            return await context.abort(code, str(error))

    return call


class RuntimeService(pb_grpc.RuntimeServiceServicer):  # type: ignore[misc]
    """Pods and containers."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # The messages that objects were made from: their labels and names are given back in every answer.
        self._pods: dict[str, Any] = {}
        self._configs: dict[str, Any] = {}

    async def Version(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - names of the interface
        """Who answers."""
        names = {"runtime_name": "localcluster", "runtime_version": "1.0.0", "runtime_api_version": "v1"}
        return pb.VersionResponse(version="0.1.0", **names)

    async def Status(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Ready from the start: there is nothing to wait for."""
        conditions = [pb.RuntimeCondition(type=t, status=True) for t in ("RuntimeReady", "NetworkReady")]
        return pb.StatusResponse(status=pb.RuntimeStatus(conditions=conditions))

    async def RuntimeConfig(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """The cgroup driver, which nothing here uses."""
        return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=pb.CGROUPFS))

    async def UpdateRuntimeConfig(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Takes note of nothing: the pod network is fixed."""
        return pb.UpdateRuntimeConfigResponse()

    @_answer
    async def RunPodSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Makes a pod's namespaces."""
        sandbox = self._runtime.run_sandbox(convert.sandbox_config(request.config))
        self._pods[sandbox.id] = request.config
        return pb.RunPodSandboxResponse(pod_sandbox_id=sandbox.id)

    @_answer
    async def StopPodSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Idempotent, also for a sandbox long gone."""
        if request.pod_sandbox_id in self._runtime.sandboxes:
            await self._runtime.stop_sandbox(self._runtime.get_sandbox(request.pod_sandbox_id))
        return pb.StopPodSandboxResponse()

    @_answer
    async def RemovePodSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Idempotent, also for a sandbox long gone."""
        if request.pod_sandbox_id in self._runtime.sandboxes:
            sandbox = self._runtime.get_sandbox(request.pod_sandbox_id)
            for container in self._runtime.containers_of(sandbox):
                self._configs.pop(container.id, None)
            await self._runtime.remove_sandbox(sandbox)
            self._pods.pop(sandbox.id, None)
        return pb.RemovePodSandboxResponse()

    @_answer
    async def PodSandboxStatus(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """One sandbox in full."""
        sandbox = self._runtime.get_sandbox(request.pod_sandbox_id)
        return pb.PodSandboxStatusResponse(status=convert.sandbox_status(pb, sandbox, self._pods[sandbox.id]))

    async def ListPodSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Sandboxes by id, state and labels."""
        found = [convert.pod_sandbox(pb, s, self._pods[s.id]) for s in list(self._runtime.sandboxes.values())]
        wanted = request.filter
        kept = [
            s
            for s in found
            if s.id.startswith(wanted.id) and convert.matches(wanted.label_selector, s.labels)
        ]
        if wanted.HasField("state"):
            kept = [s for s in kept if s.state == wanted.state.state]
        return pb.ListPodSandboxResponse(items=kept)

    @_answer
    async def CreateContainer(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Checks that the container could start."""
        sandbox = self._runtime.get_sandbox(request.pod_sandbox_id)
        image = images.find(self._runtime.images(), request.config.image.image)
        container = self._runtime.create(sandbox, convert.container_config(request.config, image))
        self._configs[container.id] = request.config
        return pb.CreateContainerResponse(container_id=container.id)

    @_answer
    async def StartContainer(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Starts the process."""
        await self._runtime.start(self._runtime.get_container(request.container_id))
        return pb.StartContainerResponse()

    @_answer
    async def StopContainer(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Asks the process to end, and kills it after the grace period."""
        if request.container_id in self._runtime.containers:
            await self._runtime.stop(self._runtime.get_container(request.container_id), request.timeout)
        return pb.StopContainerResponse()

    @_answer
    async def RemoveContainer(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Idempotent, also for a container long gone."""
        if request.container_id in self._runtime.containers:
            await self._runtime.remove(self._runtime.get_container(request.container_id))
            self._configs.pop(request.container_id, None)
        return pb.RemoveContainerResponse()

    async def ListContainers(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Containers by id, sandbox, state and labels."""
        found = [
            convert.container_summary(pb, c, self._configs[c.id]) for c in self._selected(request.filter)
        ]
        if request.filter.HasField("state"):
            found = [c for c in found if c.state == request.filter.state.state]
        return pb.ListContainersResponse(containers=found)

    def _selected(self, wanted: Any) -> list[Container]:
        return [
            c
            for c in list(self._runtime.containers.values())
            if c.id.startswith(wanted.id)
            and wanted.pod_sandbox_id in ("", c.sandbox.id)
            and convert.matches(wanted.label_selector, self._configs[c.id].labels)
        ]

    @_answer
    async def ContainerStatus(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """One container in full."""
        container = self._runtime.get_container(request.container_id)
        return pb.ContainerStatusResponse(
            status=convert.container_status(pb, container, self._configs[container.id])
        )

    async def UpdateContainerResources(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Accepts everything: resources are scheduled by, but not enforced."""
        return pb.UpdateContainerResourcesResponse()

    @_answer
    async def ReopenContainerLog(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """After the kubelet has rotated a log."""
        log = self._runtime.get_container(request.container_id).log
        if log is not None:
            log.reopen()
        return pb.ReopenContainerLogResponse()

    @_answer
    async def ExecSync(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        """Executes a probe or hook in a container."""
        container = self._runtime.get_container(request.container_id)
        if not container.running:
            raise NoSuchObjectError(f"container {container.id} is not running")
        environment = self._runtime.environment(container)
        finished = await process.execute(container.pid, request.cmd, environment, request.timeout)
        if finished is None:
            return await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"the command took more than {request.timeout} s"
            )
        return pb.ExecSyncResponse(
            stdout=finished.stdout, stderr=finished.stderr, exit_code=finished.exit_code
        )

    async def Exec(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802, ARG002
        """Not here."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, _STREAMING.format(what="exec"))

    async def Attach(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802, ARG002
        """Not here."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, _STREAMING.format(what="attach"))

    async def PortForward(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802, ARG002
        """Not here."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, _STREAMING.format(what="port forwarding"))

    async def _stats(self, container: Container) -> Any:
        used = await asyncio.to_thread(stats.usage, container.pid) if container.running else stats.Usage()
        return convert.container_stats(pb, container, self._configs[container.id], used)

    @_answer
    async def ContainerStats(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """What one container uses."""
        container = self._runtime.get_container(request.container_id)
        return pb.ContainerStatsResponse(stats=await self._stats(container))

    async def ListContainerStats(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """What containers use."""
        selected = self._selected(request.filter)
        return pb.ListContainerStatsResponse(stats=[await self._stats(c) for c in selected if c.running])

    async def _pod_stats(self, sandbox: Sandbox) -> Any:
        config = self._pods[sandbox.id]
        attributes = pb.PodSandboxAttributes(
            id=sandbox.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
        )
        containers = [await self._stats(c) for c in self._runtime.containers_of(sandbox) if c.running]
        return pb.PodSandboxStats(attributes=attributes, linux=pb.LinuxPodSandboxStats(containers=containers))

    @_answer
    async def PodSandboxStats(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """What one pod uses."""
        sandbox = self._runtime.get_sandbox(request.pod_sandbox_id)
        return pb.PodSandboxStatsResponse(stats=await self._pod_stats(sandbox))

    async def ListPodSandboxStats(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """What pods use."""
        wanted = request.filter
        found = [
            await self._pod_stats(s)
            for s in list(self._runtime.sandboxes.values())
            if s.id.startswith(wanted.id) and convert.matches(wanted.label_selector, self._pods[s.id].labels)
        ]
        return pb.ListPodSandboxStatsResponse(stats=found)


class ImageService(pb_grpc.ImageServiceServicer):  # type: ignore[misc]
    """Images: environments of the machine under image names."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def ListImages(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """All images, or the one asked for."""
        known = self._runtime.images()
        name = request.filter.image.image
        found = [known[images.normalize(name)]] if images.normalize(name) in known else []
        return pb.ListImagesResponse(
            images=[convert.image(pb, i) for i in (found if name else known.values())]
        )

    async def ImageStatus(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """The image, or an empty answer where there is none."""
        found = self._runtime.images().get(images.normalize(request.image.image))
        return pb.ImageStatusResponse(image=convert.image(pb, found) if found else None)

    @_answer
    async def PullImage(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Known images are there; unknown ones cannot be had."""
        return pb.PullImageResponse(image_ref=images.find(self._runtime.images(), request.image.image).name)

    async def RemoveImage(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Nothing to remove."""
        return pb.RemoveImageResponse()

    async def ImageFsInfo(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Images take no space of their own."""
        filesystem = convert.filesystem(pb, INSIDE.node)
        return pb.ImageFsInfoResponse(image_filesystems=[filesystem], container_filesystems=[filesystem])


async def serve() -> None:
    """Serves until the process ends."""
    linux.become_subreaper()
    settings = read_settings(INSIDE.settings)
    hidden = [str(settings.state)]
    runtime = Runtime(INSIDE.node / "containers", INSIDE.images, hidden, [str(p) for p in settings.needed])
    server = grpc.aio.server()
    pb_grpc.add_RuntimeServiceServicer_to_server(RuntimeService(runtime), server)
    pb_grpc.add_ImageServiceServicer_to_server(ImageService(runtime), server)
    INSIDE.cri_socket.unlink(missing_ok=True)
    server.add_insecure_port(f"unix://{INSIDE.cri_socket}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
