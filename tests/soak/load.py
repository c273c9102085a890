"""Clients that stream all the time, and a tally of what they were told."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from moe_api import transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub

DEADLINE_S = 120


@dataclass
class Tally:
    """What became of the requests. failed: by status and sentence. wrong: with a gap or a repetition."""

    whole: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    @property
    def requests(self) -> int:
        return self.whole + self.failed.total() + len(self.wrong)


class Clients:
    """`count` threads that send `request` again and again; `expected` are the tokens of each answer."""

    def __init__(self, address, request, expected, count):
        self.tally = Tally()
        self._address, self._request, self._expected = address, request, expected
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    @contextmanager
    def running(self):
        for thread in self._threads:
            thread.start()
        try:
            yield self.tally
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _run(self):
        with grpc.insecure_channel(self._address, options=transport.CLIENT_OPTIONS) as channel:
            stub = InferenceServiceStub(channel)
            while not self._stop.is_set():
                self._once(stub)

    def _once(self, stub):
        started, tokens, end = time.monotonic(), [], None
        try:
            for response in stub.Generate(self._request, timeout=DEADLINE_S):
                tokens += response.tokens
                end = response if response.finish_reason else end
            failure = None
        except grpc.RpcError as error:
            failure = f"{error.code().name}: {error.details()}"
        with self._lock:
            self._count(tokens, end, failure, time.monotonic() - started)

    def _count(self, tokens, end, failure, seconds):
        self.tally.longest_s = max(self.tally.longest_s, seconds)
        if failure is not None:
            self.tally.failed[failure] += 1
        elif tokens != self._expected or end is None or end.usage.completion_tokens != len(tokens):
            self.tally.wrong.append(f"{tokens} instead of {self._expected}")
        else:
            self.tally.whole += 1


def counting(number, pause_s):
    """A request to stand-in workers: so many tokens, so far apart."""
    return pb.GenerateRequest(prompt=f"count {number} {pause_s}"), list(range(number))
