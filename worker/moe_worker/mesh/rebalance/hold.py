"""The experts that a rank holds: others are read in the background, and taken between two passes."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from moe_worker.mesh.dispatch import PlaceTable
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.member import Member
from moe_worker.mesh.messages import Prepare, Switch
from moe_worker.mesh.part import place_table
from moe_worker.mesh.places import ExpertPlaces, Moved
from moe_worker.mesh.rebalance.pace import DroppedError, Pace
from moe_worker.moe.experts import Experts

log = logging.getLogger(__name__)
# The usual 5 ms are two steps of a GPU.
SWITCH_S = 2e-4
# Prepares experts of a layer instead of those held before, and calls back after each matrix; the result is
# for `HoldsExperts.hold`.
ReadExperts = Callable[[int, Sequence[int], Sequence[int], Callable[[], object]], object]


class ReadsExperts(Protocol):
    """Reads experts of one layer."""

    def __call__(self, held: Sequence[int], rest: Callable[[], object], shared: bool) -> Experts:
        """The routed experts `held`, and behind them the shared ones if `shared`. rest: called between
        matrices.
        """
        ...


class HoldsExperts(Protocol):
    """A rank's stage whose experts may change between two passes."""

    def aside(self) -> AbstractContextManager[object]:
        """For a thread that reads and converts experts while another one computes."""
        ...

    def prepared(
        self, layer: int, before: Sequence[int], held: Sequence[int], read: ReadsExperts,
        rest: Callable[[], object],
    ) -> object:  # fmt: skip
        """What `hold` takes, so that the stage computes the experts `held` of `layer` where it computes those
        of `before`. rest: called between matrices.
        """
        ...

    def hold(self, layer: int, experts: Any, table: PlaceTable) -> object:
        """From the next pass on, this rank computes `experts` of `layer`, and finds all others by `table`.

        experts: of `prepared`. Returns what is needed no more; reads nothing.
        """
        ...

    def place(self, layer: int, table: PlaceTable) -> None:
        """From the next pass on, experts of `layer` are where `table` says."""
        ...


class HeldExperts:
    """The experts of this rank. What a move brings is read in a thread; all else belongs to the thread of the
    passes.

    progress: the number of the move that is prepared, negative where it failed; else 0. pace: is told of all
    passes.
    """

    def __init__(
        self, places: ExpertPlaces, member: Member, part: HoldsExperts, read: ReadExperts,
        pace: Pace | None = None,
    ) -> None:  # fmt: skip
        self.places, self.progress = places, 0
        self.pace = pace or Pace()
        self._member, self._part, self._read = member, part, read
        self._reading = threading.Lock()
        self._holds = {layer: places.held(layer, member.column) for layer in places.layers}
        self._changing = threading.Lock()
        self._move: Prepare | None = None
        self._prepared: object | None = None

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
        before = self._holds[move.layer]
        with self._changing:
            self._move, self._prepared = move, None
        _in_background(lambda: self._run(move, before))

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
            own = self.places.held(layer, self._member.column)
            if own != self._holds[layer]:
                self._hold(layer, self._read(layer, self._holds[layer], own, lambda: None))
            else:
                self._part.place(layer, self._table(layer))

    def _hold(self, layer: int, experts: object) -> None:
        before = [self._part.hold(layer, experts, self._table(layer))]
        self._holds[layer] = self.places.held(layer, self._member.column)
        _in_background(before.clear)  # to free gigabytes takes longer than to switch

    def _table(self, layer: int) -> PlaceTable:
        return place_table(self.places, self._member, layer, torch.device("cpu"))

    def _run(self, move: Prepare, before: Sequence[int]) -> None:
        with self._reading, _giving_way():
            try:
                each = len(move.places) // self.places.ranks
                held = move.places[self._member.column * each : (self._member.column + 1) * each]
                work = self.pace.work(lambda: self._move is move)
                experts = self._read(move.layer, before, held, work.rest)
            except DroppedError:
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


@contextlib.contextmanager
def _giving_way() -> Iterator[None]:
    """Meanwhile no thread keeps the interpreter's lock for longer than SWITCH_S from others that want it."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _in_background(run: Callable[[], object]) -> None:
    """In a thread of its own, whose operations use no other one: those of torch belong to the passes."""
    usual = torch.get_num_threads()

    def alone() -> None:
        torch.set_num_threads(1)  # also of threads that begin to compute from now on
        try:
            run()
        finally:
            torch.set_num_threads(usual)

    threading.Thread(target=alone, name="mesh experts", daemon=True).start()
