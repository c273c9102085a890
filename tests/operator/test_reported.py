"""What a worker says of itself and the status repeats: bounded, whatever it says."""

import asyncio

import grpc
import pytest

from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.worker.v1 import worker_pb2
from moe_operator.autoscaling.readings import summary
from moe_operator.resources.crd import schema
from moe_operator.rpc import leader

MODEL = schema()["properties"]["status"]["properties"]["model"]["properties"]


class Liar(inference_pb2_grpc.InferenceServiceServicer):
    async def GetModel(self, request, context):
        return inference_pb2.Model(
            architecture="\x1b]52;c;cm0gLXJm\x07" + "a" * 60_000,
            format="bf16\nforged",
            parameters_total=2**64 - 1,
            parameters_active=2**63,
            context_length=2**32 - 1,
        )


@pytest.fixture
async def liar(monkeypatch):
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Liar(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    monkeypatch.setattr("moe_operator.rpc.dialing.target", lambda _: f"127.0.0.1:{port}")
    yield
    await server.stop(None)


async def test_names_and_numbers_of_a_model_fit_the_status(liar):
    found = await asyncio.to_thread(leader.get_model, "127.0.0.1", "abc", 10.0)
    assert found.architecture.startswith("\\x1b]52;c;cm0gLXJm\\x07aaa")
    assert len(found.architecture) == MODEL["architecture"]["maxLength"] == 64
    assert found.format == "bf16 forged"
    assert (found.parameters_total, found.parameters_active) == (2**63 - 1, 2**63 - 1)


def test_a_load_beyond_all_capacity_fits_the_status():
    load = worker_pb2.Load(kv_tokens_capacity=1, kv_tokens_used=2**64 - 1)
    assert summary(load, "docs-0-0").kv_used_percent == 100
