"""A worker that answers at random: `python -m tests.soak.liar SEED` prints its address, then serves.

Its health and its model are as a frontend wants them; the answers to Generate are messages of the contract,
mutated messages and noise, then an end of any kind.
"""

from __future__ import annotations

import asyncio
import random
import sys

import grpc

from moe_api.health import Health
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.server import create_server
from tests.soak.attack import mutated

SERVICE = "moe_api.inference.v1.InferenceService"
CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


class Liar:
    """chance: what decides about every message."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    async def generate(self, request, context):
        for _ in range(self._chance.randrange(8)):
            yield self._message(request)
        if self._chance.random() < 0.3:
            await context.abort(self._chance.choice(CODES), "no reason")

    async def get_model(self, request, context):
        return pb.Model(name="m", vocabulary_size=256)

    def _message(self, request):
        chance = self._chance
        honest = pb.GenerateResponse(
            text="text",
            tokens=[chance.randrange(256) for _ in range(chance.randrange(4))],
            finish_reason=chance.choice((0, 0, 0, 1, 2)),
            resumed=chance.choice((0, len(request.resume.tokens), 7)),
        ).SerializeToString()
        return chance.choice((honest, honest, honest, mutated(honest, chance), chance.randbytes(20)))


async def serve(seed: int) -> None:
    """Prints the address first."""
    liar, server = Liar(random.Random(seed)), create_server()
    handlers = {
        "Generate": grpc.unary_stream_rpc_method_handler(liar.generate, pb.GenerateRequest.FromString),
        "GetModel": grpc.unary_unary_rpc_method_handler(
            liar.get_model, pb.GetModelRequest.FromString, pb.Model.SerializeToString
        ),
    }
    server.add_registered_method_handlers(SERVICE, handlers)
    health = Health([SERVICE])
    await health.register(server)
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await health.set_ready(ready=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
