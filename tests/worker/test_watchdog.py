"""A silent engine is hung; an edge that was stopped itself is no reason to think so."""

import pytest

from moe_worker.service.watchdog import Watchdog

TIMEOUT_S = 100.0


@pytest.fixture
def watched():
    now = [0.0]
    dog = Watchdog(TIMEOUT_S, lambda: now[0])

    def wait(seconds, *, busy=True):
        """Ticks as the event loop would for so long."""
        end = now[0] + seconds
        while now[0] < end and not dog.hung:
            now[0] += dog.tick_s
            dog.tick(busy=busy)

    def stop(seconds):
        """The edge is stopped for so long: no tick, then one."""
        now[0] += seconds
        dog.tick(busy=True)

    return dog, wait, stop, now


def test_silence_with_requests_to_compute_is_a_hang(watched):
    dog, wait, _, now = watched
    wait(10 * TIMEOUT_S)
    assert dog.hung
    assert TIMEOUT_S < now[0] <= TIMEOUT_S + 3 * dog.tick_s


def test_an_idle_engine_is_not_hung(watched):
    dog, wait, _, _ = watched
    wait(10 * TIMEOUT_S, busy=False)
    assert not dog.hung


def test_a_step_ends_the_silence(watched):
    dog, wait, _, _ = watched
    for _ in range(20):
        wait(0.8 * TIMEOUT_S)
        dog.heard()
    assert not dog.hung


@pytest.mark.parametrize("seconds", [1.5 * TIMEOUT_S, 3600.0])
def test_a_stopped_edge_does_not_kill_its_engine(watched, seconds):
    dog, wait, stop, _ = watched
    wait(0.5 * TIMEOUT_S)
    stop(seconds)
    assert not dog.hung
    dog.heard()  # what the engine sent meanwhile
    wait(0.5 * TIMEOUT_S)
    assert not dog.hung


def test_an_engine_that_hangs_while_the_edge_is_stopped_is_found_afterwards(watched):
    dog, wait, stop, _ = watched
    wait(2 * dog.tick_s)
    stop(3600)
    wait(10 * TIMEOUT_S)
    assert dog.hung
