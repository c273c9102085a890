"""What progress looks like in a log and on a terminal."""

import io
import re
from contextlib import redirect_stderr
from pathlib import Path

from moe_worker import progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def log():
    """Stands for stderr from now on in this test; a fixture would be undone by pytest's own capture."""
    return redirect_stderr(Stream(terminal=False))


def shown(stream):
    return [line.partition(" after")[0] for line in stream.getvalue().splitlines()]


def test_a_log_gets_the_first_and_the_last_step_as_lines():
    with log() as stream:
        assert list(progress.bar(range(1000), desc="measuring", unit="round")) == list(range(1000))
    assert shown(stream) == ["measuring: 0 % (0 of 1000)", "measuring: 100 % (1000 of 1000)"]
    assert not re.search(r"[\r\x1b]", stream.getvalue())


def test_a_log_gets_lines_at_intervals_with_the_latest_figures(monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    with log() as stream, progress.bar(total=4, desc="train", unit="step", initial=1) as bar:
        for step in (1, 2, 3):
            bar.set_postfix({"loss": f"{1 / step:.2g}"}, refresh=False)
            bar.update()
    assert list(dict.fromkeys(shown(stream))) == [
        f"train: {done} % ({done // 25} of 4)" for done in (25, 50, 75, 100)
    ]
    assert stream.getvalue().splitlines()[-1].endswith(", loss=0.33")


def test_two_bars_and_a_sentence_share_a_log():
    with log() as stream, progress.bar(total=1, desc="outer", unit="step") as outer:
        with progress.bar(total=2, desc="inner", unit="step") as inner:
            inner.update(2)
        progress.tell("weights in memory: 5 MB")
        outer.update()
    said = [line.partition(":")[0] for line in shown(stream)]
    assert said == ["outer", "inner", "inner", "weights in memory", "outer"]
    assert not re.search(r"[\r\x1b]", stream.getvalue())


def test_a_terminal_gets_one_line_that_is_rewritten():
    terminal = Stream(terminal=True)
    with redirect_stderr(terminal), progress.bar(total=2, desc="measuring", unit="round") as bar:
        bar.update(2)
    assert terminal.getvalue().count("\r") > 1
    assert terminal.getvalue().count("\n") == 1


def test_a_transient_bar_is_not_shown_for_short_work():
    for terminal in (False, True):
        stream = Stream(terminal)
        with redirect_stderr(stream), progress.transient_bar(total=2, desc="score", unit="token") as bar:
            bar.update(2)
        assert stream.getvalue() == ""


def test_a_transient_bar_shows_longer_work_and_disappears(monkeypatch):
    monkeypatch.setattr(progress, "TRANSIENT_AFTER_S", 0.0)
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    with log() as stream, progress.transient_bar(total=2, desc="score", unit="token") as bar:
        bar.update()
    assert shown(stream) == ["score: 0 % (0.00 of 2.00)", "score: 50 % (1.00 of 2.00)"]
    terminal = Stream(terminal=True)
    with redirect_stderr(terminal), progress.transient_bar(total=2, desc="score", unit="token") as bar:
        bar.update()
    *_, before, last = terminal.getvalue().rstrip("\r").split("\r")
    assert before.startswith("score:")
    assert not last.strip()
    assert "\n" not in terminal.getvalue()


def test_nothing_is_shown_where_it_is_disabled():
    with log() as stream:
        assert list(progress.bar([1, 2], desc="quiet", unit="step", disable=True)) == [1, 2]
    assert stream.getvalue() == ""


def test_every_bar_of_the_worker_comes_from_here():
    package = Path(progress.__file__).parent
    makers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"tqdm\(|tqdm\.write", path.read_text())
    }
    assert makers == {"progress.py"}
