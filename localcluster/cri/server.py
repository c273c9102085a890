"""The process runtime as a server for the kubelet, on a unix socket: `python -m localcluster.cri.server`."""

from __future__ import annotations

import asyncio

import grpc

from localcluster import linux
from localcluster.cri.image_service import ImageService
from localcluster.cri.interface import Interface
from localcluster.cri.runtime import CannotStartError, NoSuchObjectError, Runtime
from localcluster.cri.runtime_service import CommandTimeoutError, NotHereError, RuntimeService
from localcluster.errors import ImageError
from localcluster.layout import INSIDE
from localcluster.settings import read_settings

_CODES: dict[type[Exception], grpc.StatusCode] = {
    NoSuchObjectError: grpc.StatusCode.NOT_FOUND,
    ImageError: grpc.StatusCode.NOT_FOUND,
    CannotStartError: grpc.StatusCode.UNKNOWN,
    NotHereError: grpc.StatusCode.UNIMPLEMENTED,
    CommandTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    OSError: grpc.StatusCode.INTERNAL,
}


async def serve() -> None:
    """Serves until the process ends."""
    linux.become_subreaper()
    settings = read_settings(INSIDE.settings)
    interface = Interface.load(settings.tools["cri-descriptor"])
    needed = [str(path) for path in settings.needed]
    runtime = Runtime(INSIDE.node / "containers", INSIDE.images, [str(settings.state)], needed)
    runtime_service = RuntimeService(runtime, interface.pb)
    image_service = ImageService(INSIDE.images, interface.pb)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (
            interface.handler("RuntimeService", runtime_service.methods(), _CODES),
            interface.handler("ImageService", image_service.methods(), _CODES),
        )
    )
    INSIDE.cri_socket.unlink(missing_ok=True)
    server.add_insecure_port(f"unix://{INSIDE.cri_socket}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
