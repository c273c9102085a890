"""A wall clock that does not go back."""

from moe_api.clock import ForwardClock


def test_it_runs_on_when_the_wall_clock_is_set_back_and_follows_it_forward():
    wall, monotonic = [1000.0], [5.0]
    clock = ForwardClock(lambda: wall[0], lambda: monotonic[0])
    assert clock() == 1000

    def after(seconds, set_by=0.0):
        monotonic[0] += seconds
        wall[0] += seconds + set_by
        return clock()

    assert after(10) == 1010
    assert after(10, set_by=-3600) == 1010 + 9.5
    assert after(10) == 1010 + 2 * 9.5
    assert after(10, set_by=7200) == 1040 + 3600


def test_the_wall_clock_catches_up_with_it():
    wall, monotonic = [1000.0], [5.0]
    clock = ForwardClock(lambda: wall[0], lambda: monotonic[0])
    clock()
    wall[0] -= 60
    read = []
    for _ in range(130):
        monotonic[0] += 10
        wall[0] += 10
        read.append(clock())
    assert read == sorted(read)
    ahead_s = [at - (1000 - 60 + 10 * turn) for turn, at in enumerate(read, 1)]
    assert ahead_s[60] > 0
    assert ahead_s[-1] == 0


def test_a_pause_within_a_reading_does_not_put_it_ahead():
    elapsed, pauses = [0.0], [0.0, 5.0, 0.0, 0.0, 7.0, 3.0]

    def after_a_pause(start):
        elapsed[0] += pauses.pop(0) if pauses else 0.0
        return start + elapsed[0]

    clock = ForwardClock(lambda: after_a_pause(1000.0), lambda: after_a_pause(50.0))
    for _ in range(4):
        assert clock() <= 1000 + elapsed[0]
