"""Attackers of one address, each a process that yields the processors to whom it attacks.

`python -m tests.soak.attack KIND HOST:PORT COUNT SEED`; prints, as JSON, how often it was answered with what.
It fails where the server no longer takes a connection or answers a call.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection

from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub

SERVICE = "/moe_api.inference.v1.InferenceService/"
AT_ONCE = 32
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a connection must begin with, and empty SETTINGS."""
HEADERS = (
    *((":method", "POST"), (":scheme", "http"), (":authority", "127.0.0.1")),
    *(("te", "trailers"), ("content-type", "application/grpc")),
)
ANSWER_S = 120.0
READ_S = 0.2
"""How long the server may take to close a connection whose frames make no sense, before we do."""

SEEDS = (
    ("Generate", pb.GenerateRequest(prompt="The kernel maps a page", sampling={"max_tokens": 2})),
    (
        "Generate",
        pb.GenerateRequest(
            prompt_tokens={"ids": [1, 2, 300]},
            sampling={
                "max_tokens": 2,
                "temperature": 0.7,
                "seed": 7,
                "stop": ["\n\n", "end"],
                "logit_bias": {5: -100.0, 6: 1.5},
                "stop_token_ids": [3, 4],
                "logprobs": 3,
            },
            resume={"tokens": [9], "seed": 5},
        ),
    ),
    ("Tokenize", pb.TokenizeRequest(model="docs-moe", text="a text of some length", add_special_tokens=True)),
    ("GetModel", pb.GetModelRequest(model="docs-moe")),
)

OTHER_MODEL = pb.GetModelRequest(model="other").SerializeToString()
"""Behind a request of any method, this changes the name of the model in it."""


def mutated(content: bytes, chance: random.Random) -> bytes:
    """`content` after one to eight random edits: a flipped bit, a cut, an insertion or a repeated piece."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1:
                data[at:at] = chance.randbytes(chance.randint(1, 16))
            case 2:
                del data[at : at + chance.randint(1, 8)]
            case 3:
                data[at:at] = data[max(0, at - 16) : at] * chance.randint(1, 8)
            case 4:
                data[at:at] = b"\xff" * chance.randint(1, 10)
    return bytes(data)


async def protobufs(address: str, count: int, chance: random.Random) -> Counter[str]:
    """Sends mutated messages to every method; one answer to each, then the call is given up."""
    told: Counter[str] = Counter()
    left = iter(range(count))
    async with grpc.aio.insecure_channel(address) as channel:

        async def attack() -> None:
            for _ in left:
                method, message = chance.choice(SEEDS)
                call = channel.unary_stream(SERVICE + method)(
                    mutated(message.SerializeToString(), chance), timeout=ANSWER_S
                )
                try:
                    answer = await call.read()
                    told["OK" if answer is not grpc.aio.EOF else (await call.code()).name] += 1
                except grpc.aio.AioRpcError as error:
                    told[error.code().name] += 1
                finally:
                    call.cancel()

        await asyncio.gather(*(attack() for _ in range(AT_ONCE)))
    return told


async def requests(address: str, count: int, chance: random.Random) -> Counter[str]:
    """Sends valid requests and reads their answers to the end."""
    told: Counter[str] = Counter()
    left = iter(range(count))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceServiceStub(channel)

        async def attack() -> None:
            for _ in left:
                sampling = pb.SamplingParameters(max_tokens=chance.randint(1, 20))
                call = stub.Generate(pb.GenerateRequest(prompt="p", sampling=sampling), timeout=ANSWER_S)
                try:
                    async for _ in call:
                        pass
                    told["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    told[error.code().name] += 1

        await asyncio.gather(*(attack() for _ in range(AT_ONCE)))
    return told


def frame(chance: random.Random) -> bytes:
    """One HTTP/2 frame of any type with any flags, stream and content; its length is mostly true."""
    payload = chance.randbytes(chance.choice((0, 1, 4, 5, 6, 8, 9, 17, 64, 512)))
    length = len(payload) if chance.random() < 0.95 else chance.randrange(2**24)
    stream = chance.choice((0, 1, 2, 3, 5, chance.randrange(2**32)))
    kind, flags = chance.randrange(12), chance.randrange(256)
    return length.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def random_frames(chance: random.Random) -> list[bytes]:
    """As many as a server reads at most before one of them ends the connection."""
    return [frame(chance) for _ in range(8)]


def conversation() -> list[bytes]:
    """The frames of a connection on which a well-behaved client makes some calls.

    They ask for another model. So the figure is what the frames cost, not what answers cost.
    """
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    sent = [client.data_to_send()]
    for method, message in SEEDS:
        stream = client.get_next_available_stream_id()
        client.send_headers(stream, [(":path", SERVICE + method), *HEADERS])
        sent.append(client.data_to_send())
        content = message.SerializeToString() + OTHER_MODEL
        client.send_data(stream, b"\0" + len(content).to_bytes(4, "big") + content, end_stream=True)
        sent.append(client.data_to_send())
    return sent


def damaged(said: list[bytes], chance: random.Random) -> list[bytes]:
    """A conversation of which frames are lost, repeated, reordered, mutated or joined by random ones."""
    said = list(said)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(1, len(said))
        match chance.randrange(5):
            case 0:
                said[at] = mutated(said[at], chance)
            case 1:
                said.insert(at, said[chance.randrange(len(said))])
            case 2:
                said.insert(at, frame(chance))
            case 3:
                said[at:] = chance.sample(said[at:], len(said) - at)
            case 4 if len(said) > 2:
                del said[at]
    return said


async def frames(address: str, count: int, chance: random.Random) -> Counter[str]:
    """Sends damaged conversations and random HTTP/2 frames, each lot on a connection of its own."""
    told: Counter[str] = Counter()
    said = conversation()

    async def attack() -> None:
        while told["frames"] < count:
            lot = damaged(said, chance) if chance.random() < 0.8 else [PREFACE, *random_frames(chance)]
            told["frames"] += len(lot)
            told[await connect_and_send(address, b"".join(lot))] += 1

    await asyncio.gather(*(attack() for _ in range(AT_ONCE)))
    return told


async def connect_and_send(address: str, data: bytes) -> str:
    """Sends `data` on a connection of its own; how that ended."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), ANSWER_S)
    try:
        writer.write(data)
        await writer.drain()
        await asyncio.wait_for(reader.read(), READ_S)
    except TimeoutError:
        return "left open"
    except ConnectionError:
        return "reset"
    finally:
        writer.close()
    return "closed"


ATTACKS = {"protobufs": protobufs, "frames": frames, "requests": requests}


def main() -> None:
    """See the module."""
    os.nice(19)
    kind, address, count, seed = sys.argv[1:]
    told = asyncio.run(ATTACKS[kind](address, int(count), random.Random(seed)))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
