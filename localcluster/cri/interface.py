"""The Container Runtime Interface (v1): its messages, made from the definition that the kubelet itself
carries.

`Interface.load` takes the serialized FileDescriptorProto that the tool `cri-descriptor` prints, so there is
neither generated code nor a protobuf compiler, and the runtime always speaks the kubelet's version.
"""

from __future__ import annotations

import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# A method of the interface: takes the request message, returns the response message.
Method = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True)
class Interface:
    """Messages and enum values by name (`pb.PodSandbox`, `pb.SANDBOX_READY`), and the file's description."""

    pb: Any
    file: Any

    @staticmethod
    def load(tool: Path) -> Interface:
        """Runs `cri-descriptor` and makes the messages."""
        content = subprocess.run([tool], stdout=subprocess.PIPE, check=True).stdout
        name = descriptor_pb2.FileDescriptorProto.FromString(content).name
        pool = descriptor_pool.DescriptorPool()
        pool.AddSerializedFile(content)
        file = pool.FindFileByName(name)
        names = {key: message_factory.GetMessageClass(d) for key, d in file.message_types_by_name.items()}
        values = {v.name: v.number for enum in file.enum_types_by_name.values() for v in enum.values}
        return Interface(SimpleNamespace(**names, **values), file)

    def handler(
        self, service: str, methods: Mapping[str, Method], codes: Mapping[type[Exception], grpc.StatusCode]
    ) -> grpc.GenericRpcHandler:
        """A gRPC service with these methods; gRPC answers UNIMPLEMENTED for the interface's others.

        Args:
            service: its name in the interface, as "RuntimeService".
            methods: by their names in the interface.
            codes: status codes of the exceptions that methods raise; the exception's text is the message.
        """
        description = self.file.services_by_name[service]
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(
                _answering(method, codes),
                request_deserializer=_message_class(description.methods_by_name[name].input_type).FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for name, method in methods.items()
        }
        return grpc.method_handlers_generic_handler(description.full_name, handlers)


def _message_class(description: Any) -> Any:
    return message_factory.GetMessageClass(description)


def _answering(method: Method, codes: Mapping[type[Exception], grpc.StatusCode]) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await method(request)
        except tuple(codes) as error:
            code = next(code for kind, code in codes.items() if isinstance(error, kind))
            return await context.abort(code, str(error))

    return call
