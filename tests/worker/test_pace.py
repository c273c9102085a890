"""A rank reads experts during its passes: as much as they grant, and nothing while they are late."""

import contextlib
import threading
import time

import pytest
import torch

from moe_worker.kernels.cpu.library import Kernels
from moe_worker.mesh.rebalance.pace import IDLE_S, LATE, SHARE, DroppedError, Grants, Pace
from moe_worker.models.native import _experts
from moe_worker.moe.experts import Experts
from moe_worker.quant.int4 import quantize_int4
from moe_worker.quant.matrix import Dense, stack

DEADLINE_S = 30


def granted(*passes):
    grants = Grants()
    for seconds in passes:
        grants.passed(seconds, seconds)
    return grants.left_s


def test_a_pass_grants_a_share_of_its_time_and_grants_do_not_add_up():
    assert granted() == 0
    assert granted(4.0) == granted(*[4.0] * 9) == SHARE * 4.0
    assert granted(4.0, 4.0, 2.0) == SHARE * 2.0
    assert granted(4.0, 4.0, 5.0) == SHARE * 4.0


def test_too_much_work_is_paid_by_later_passes():
    grants = Grants()
    grants.passed(5.0, 4.0)
    grants.worked(3.5)
    owed = []
    while grants.left_s <= 0:
        owed.append(grants.left_s)
        grants.passed(5.0, 4.0)
    assert owed == [-2.5, -1.5, -0.5]


def test_a_late_pass_grants_nothing_until_most_are_as_late():
    grants = Grants()
    for _ in range(8):
        grants.passed(1.0, 1.0)
    grants.worked(grants.left_s)
    late = 1.01 * LATE
    for _ in range(7):
        grants.passed(late, late)
        assert grants.left_s == 0
    while grants.left_s <= 0:  # passes have become longer, so this is no delay
        grants.passed(late, late)
    assert grants.left_s > SHARE


class Passes:
    """A rank whose clocks stand still but for its passes, which wait for others half of the time.

    pieces: those that its thread has done.
    """

    def __init__(self, piece_s, launches=False):
        self.now, self.worked, self.pieces, self.wanted, self.ended = 0.0, 0.0, 0, True, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.pace = Pace(lambda: self.now, self._busy, launches)
        self._piece_s = piece_s
        self._thread.start()

    def _run(self):
        work = self.pace.work(lambda: self.wanted)
        try:
            while True:
                self.worked += self._piece_s
                self.pieces += 1
                work.rest()
        except DroppedError as error:
            self.ended = error

    def _busy(self):
        return self.worked if threading.current_thread() is self._thread else self.now / 2

    def compute(self, busy_s):
        with self.pace.passing():
            self.now += 2 * busy_s

    def has_done(self, pieces):
        """Waits for so many; more than these are an error."""
        end = time.monotonic() + DEADLINE_S
        while self.pieces < pieces:
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(0.002)  # for one too many
        assert self.pieces == pieces

    def drop(self):
        self.wanted = False
        self._thread.join(DEADLINE_S)
        assert isinstance(self.ended, DroppedError)


@pytest.mark.parametrize("piece_s", [0.25, 0.75, 1.0, 2.0])
def test_work_during_a_pass_is_at_most_a_piece_over_what_was_granted(piece_s):
    """Passes with 4 s of processor time, which grant 1 s each."""
    rank = Passes(piece_s)
    rank.has_done(1)
    left_s, pieces = -piece_s, 1
    for _ in range(5):
        left_s = min(left_s + SHARE * 4, SHARE * 4)
        while left_s > 0:
            left_s, pieces = left_s - piece_s, pieces + 1
        rank.compute(4.0)
        rank.has_done(pieces)
    assert 4 <= (pieces - 1) * piece_s <= 6
    rank.drop()


def test_a_pass_that_launches_grants_by_the_time_since_the_one_before():
    """On a GPU it is over for the processor at once."""
    period_s = 2.0**-6  # less than IDLE_S; sums are exact
    rank = Passes(SHARE * period_s / 2, launches=True)
    rank.has_done(1)
    for number in range(4):
        rank.now += period_s
        rank.compute(0.0)
        rank.has_done(2 * number + 2)
    rank.drop()


def test_work_stops_while_passes_are_late():
    rank = Passes(SHARE / 2)
    for number in range(8):
        rank.has_done(max(1, 2 * number))
        rank.compute(1.0)
    rank.has_done(16)
    for _ in range(7):
        rank.compute(2.0)
        rank.has_done(16)
    rank.compute(1.0)
    rank.has_done(18)
    rank.drop()


def test_an_idle_rank_reads_on_and_one_that_computes_for_long_does_not():
    rank = Passes(1.0)
    with contextlib.ExitStack() as computing:
        computing.enter_context(rank.pace.passing())
        rank.has_done(1)
        rank.now += 100 * IDLE_S
        time.sleep(2 * IDLE_S)
        rank.has_done(1)
    rank.now += 2 * IDLE_S
    while rank.pieces < 10:
        time.sleep(0.001)
    rank.drop()


def test_work_ends_as_soon_as_it_is_dropped():
    rank = Passes(1.0)
    rank.has_done(1)
    rank.drop()


def test_matrices_are_stacked_and_packed_with_a_rest_behind_each():
    rests = []

    def rest():
        rests.append(None)

    matrices = [Dense(torch.randn(8, 128, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    assert stack(matrices, rest).values.equal(stack(matrices).values)
    assert len(rests) == 2
    experts = Experts(
        stack([quantize_int4(torch.randn(64, 128), 64) for _ in range(3)]),
        stack([quantize_int4(torch.randn(128, 64), 64) for _ in range(3)]),
    )
    _experts(experts, Kernels(threads=1), rest)
    assert len(rests) == 2 + 3 + 3
