"""How the build shows its progress, on a terminal and in a log."""

from __future__ import annotations

import io

from localcluster.progress import Reporter, Step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_line_rewritten() -> None:
    screen = Terminal()
    with Reporter(screen) as reporter:
        reporter.show(Step("compiling kubernetes", 7, 2827, 65.2))
        reporter.show(Step("compiling kubernetes", 8, 2827, 65.9))
    assert screen.getvalue() == (
        "\r\x1b[Kcompiling kubernetes 7/2827  1:05\r\x1b[Kcompiling kubernetes 8/2827  1:05\n"
    )


def test_a_log_gets_a_line_now_and_then() -> None:
    now = [0.0]
    log = io.StringIO()
    with Reporter(log, clock=lambda: now[0]) as reporter:
        for done in range(1, 41):
            reporter.show(Step("compiling", done, 40, now[0]))
            now[0] += 1.0
    shown = [line.split()[1] for line in log.getvalue().splitlines()]
    assert shown == ["1/40", "16/40", "31/40", "40/40"]
