"""Asks the leaders of gangs for their ranks and the load of each, at most every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import grpc

from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_operator.observed.pods import Pod
from moe_operator.planner.mesh import Balance, MeshReading, balance
from moe_operator.rpc.dialing import PLAINTEXT, Dialer, answers_up_to
from moe_operator.rpc.together import ask

_FRESH_SECONDS: Final = 20.0
_KEPT: Final = 10_000
_STAGES_MOST: Final = 1024
_NUMBER_MOST: Final = 2**31 - 1
_OPTIONS: Final = answers_up_to(4 << 20)
"""The load of 256 experts in 61 layers is 80 KiB."""


@dataclass
class MeshReader:
    """Stores the last reports of leaders, by the UID of their pods. Thread-safe."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _known: dict[str, tuple[float, MeshReading | None]] = field(default_factory=dict)

    def read(
        self, leaders: Iterable[Pod], timeout_seconds: float, dialer: Dialer = PLAINTEXT
    ) -> dict[str, MeshReading]:
        """The report of each leader, by pod name, without leaders that do not respond in time."""
        leaders, now = list(leaders), time.monotonic()
        with self._lock:
            known = {pod.uid: self._known[pod.uid] for pod in leaders if pod.uid in self._known}
        stale = [pod for pod in leaders if pod.uid not in known or now - known[pod.uid][0] > _FRESH_SECONDS]
        answers = {
            pod.uid: (now, said) for pod, said in ask(lambda pod: _ask(dialer, pod, timeout_seconds), stale)
        }
        with self._lock:
            if len(self._known) > _KEPT:
                self._known.clear()
            self._known.update(answers)
        said = {pod.name: {**known, **answers}[pod.uid][1] for pod in leaders}
        return {name: reading for name, reading in said.items() if reading is not None}


def _ask(dialer: Dialer, pod: Pod, timeout_seconds: float) -> MeshReading | None:
    with dialer.channel(pod.grpc_address, _OPTIONS) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            mesh = stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=timeout_seconds).mesh
            worst = _balance(stub, timeout_seconds) if mesh.expert > 1 else None
        except grpc.RpcError:
            return None
    stages = [(stage.first_layer, stage.layers) for stage in mesh.stages[:_STAGES_MOST]]
    bounded = tuple((min(first, _NUMBER_MOST), min(layers, _NUMBER_MOST)) for first, layers in stages)
    return MeshReading(min(mesh.epoch, _NUMBER_MOST), bounded, worst)


def _balance(stub: worker_pb2_grpc.WorkerServiceStub, timeout_seconds: float) -> Balance | None:
    load = stub.GetExpertLoad(worker_pb2.GetExpertLoadRequest(), timeout=timeout_seconds)
    layers = [(min(one.layer, _NUMBER_MOST), list(one.rank_tokens)) for one in load.layers]
    # A worker may say anything: negative numbers, infinity and NaN are no loads.
    return balance((layer, loads) for layer, loads in layers if all(0 <= value < 1e300 for value in loads))
