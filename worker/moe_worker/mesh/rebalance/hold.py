"""The experts that a rank holds: others are read in the background, and taken between two passes."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from moe_worker.mesh.dispatch import PlaceTable
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.member import Member
from moe_worker.mesh.messages import Prepare, Switch
from moe_worker.mesh.part import place_table
from moe_worker.mesh.places import ExpertPlaces, Moved
from moe_worker.models.layers import ComputesExperts

log = logging.getLogger(__name__)
# A rank that reads experts in the background rests so much longer than it worked, and yields to the passes.
REST, NICE = 3.0, 10
# Reads experts of a layer; calls back with the bytes of each tensor.
ReadExperts = Callable[[int, Sequence[int], Callable[[int], object]], ComputesExperts]


class HoldsExperts(Protocol):
    """A rank's stage whose experts may change between two passes."""

    def hold(self, layer: int, experts: ComputesExperts, table: PlaceTable) -> None:
        """From the next pass on, this rank computes `experts` of `layer`, and finds all others by `table`."""
        ...

    def place(self, layer: int, table: PlaceTable) -> None:
        """From the next pass on, experts of `layer` are where `table` says."""
        ...


class HeldExperts:
    """The experts of this rank. `prepare` reads in a thread; all else belongs to the thread of the passes.

    progress: the number of the move that is prepared, negative where it failed; else 0.
    """

    def __init__(self, places: ExpertPlaces, member: Member, part: HoldsExperts, read: ReadExperts) -> None:
        self.places, self.progress = places, 0
        self._member, self._part, self._read = member, part, read
        self._reading = threading.Lock()
        self._holds = {layer: places.held(layer, member.place) for layer in places.layers}
        self._changing = threading.Lock()
        self._move: Prepare | None = None
        self._prepared: ComputesExperts | None = None

    def take(self, message: Prepare | Switch) -> None:
        """Does what the leader says between two passes. Raises MeshError."""
        if isinstance(message, Prepare):
            self._prepare(message)
        elif message.go:
            self._switch(message.number)
        else:
            self.drop()

    def _prepare(self, move: Prepare) -> None:
        """Begins to read what this rank will hold; its beats tell the leader when it is done."""
        with self._changing:
            self._move, self._prepared = move, None
        threading.Thread(target=self._run, args=(move,), name="mesh experts", daemon=True).start()

    def _switch(self, number: int) -> None:
        """Takes what was prepared. Raises MeshError where that is not move `number`."""
        move, experts = self._move, self._prepared
        if move is None or experts is None or move.number != number:
            raise MeshError(f"rank {self._member.rank} has not prepared move {number} of experts")
        self.places.move(move.layer, move.places)
        self._hold(move.layer, experts)
        self.drop()

    def drop(self) -> None:
        """Forgets the move that is being prepared."""
        with self._changing:
            self._move, self._prepared = None, None
            self._tell(0)

    def adopt(self, moved: Moved, layers: range) -> None:
        """Holds what the leader says of `layers`, after ranks have met again. Raises MeshError."""
        self.drop()
        self.places.adopt(moved)
        for layer in (layer for layer in self.places.layers if layer in layers):
            own = self.places.held(layer, self._member.place)
            if own != self._holds[layer]:
                self._hold(layer, self._read(layer, own, lambda _: None))
            else:
                self._part.place(layer, self._table(layer))

    def _hold(self, layer: int, experts: ComputesExperts) -> None:
        self._part.hold(layer, experts, self._table(layer))
        self._holds[layer] = self.places.held(layer, self._member.place)

    def _table(self, layer: int) -> PlaceTable:
        return place_table(self.places, self._member, layer, torch.device("cpu"))

    def _run(self, move: Prepare) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        with self._reading:
            try:
                each = len(move.places) // self.places.ranks
                held = move.places[self._member.place * each : (self._member.place + 1) * each]
                experts = self._read(move.layer, held, _Pace(lambda: self._move is move).rest)
            except _DroppedError:
                return
            except Exception:
                log.exception("the experts of layer %d cannot be read; they stay where they are", move.layer)
                with self._changing:
                    self._tell(-move.number if self._move is move else self.progress)
                return
            with self._changing:
                if self._move is move:
                    self._prepared = experts
                    self._tell(move.number)

    def _tell(self, progress: int) -> None:
        self.progress = progress
        for channel in () if self._member.leads else self._member.channels:
            channel.progress = progress
            channel.beat()


class _DroppedError(Exception):
    """The move was abandoned."""


class _Pace:
    """Leaves most of the time to forward passes."""

    def __init__(self, wanted: Callable[[], bool]) -> None:
        self._wanted, self._since = wanted, time.perf_counter()

    def rest(self, nbytes: int) -> None:
        """After each tensor."""
        del nbytes
        if not self._wanted():
            raise _DroppedError
        time.sleep(REST * (time.perf_counter() - self._since))
        self._since = time.perf_counter()
