"""What long commands write to a log while they work."""

import io

from moe_tools.progress import Lines


def written(calls, total):
    """The lines after each call of (seconds since the start, done, total)."""
    now, out = [0.0], io.StringIO()
    advance = Lines("forecasting", total, out, lambda: now[0])
    for at_s, *call in calls:
        now[0] = at_s
        advance(*call)
    return out.getvalue().splitlines()


def test_a_log_gets_a_line_at_the_start_each_30_s_and_at_the_end():
    steps = [(second, 10 * second) for second in range(1, 73)]
    assert written([*steps, (73, 720)], 720) == [
        "forecasting: 0 % (0 of 720) after 0:00",
        "forecasting: 41 % (300 of 720) after 0:30",
        "forecasting: 83 % (600 of 720) after 1:00",
        "forecasting: 100 % (720 of 720) after 1:12",
    ]


def test_a_total_may_become_known_on_the_way():
    assert written([(1, 1, 4), (31, 2, 4), (32, 4, 4)], None) == [
        "forecasting: 0 done after 0:00",
        "forecasting: 50 % (2 of 4) after 0:31",
        "forecasting: 100 % (4 of 4) after 0:32",
    ]
