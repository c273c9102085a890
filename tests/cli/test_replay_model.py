"""Traces are read or refused with a sentence; services keep their books; policies compare fairly."""

import gzip
import itertools
import lzma
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tools.recorded import TraceError
from moe_tools.replay import policies, scoring
from moe_tools.replay.comparison import compare
from moe_tools.replay.simulator import Service, clairvoyant, filled, outcome, simulate
from moe_tools.replay.trace import Work, WorkTrace, read

SERVICE = Service(capacity=10.0, gpus=0.5, delay=3, step_s=60.0)


def written(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    data = text.encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))
    return path


def test_ten_second_counts_become_minutes(tmp_path):
    rows = "".join(
        f"2024-05-12 00:0{second // 60}:{second % 60:02},{second}\n" for second in range(0, 180, 10)
    )
    trace = read(written(tmp_path, "time,requests\n" + rows, "a.csv.gz"))
    assert trace.step_s == 60
    assert trace.start == 1715472000
    assert trace.rates.tolist() == [150, 510, 870]


def test_missing_minutes_are_unknown_and_partly_recorded_ones_are_scaled(tmp_path):
    rows = ["0,6", "10,6", "20,6", "30,6", "40,6", "50,6", "180,6", "190,6", "200,6"]
    trace = read(written(tmp_path, "time,requests\n" + "\n".join(rows)))
    np.testing.assert_array_equal(trace.rates, [36, np.nan, np.nan, 36])


def test_rates_per_second_of_long_intervals_keep_their_interval(tmp_path):
    trace = read(written(tmp_path, "t,rate\n0,2\n600,3\n1200,0.5\n", "b.csv.xz"))
    assert trace.step_s == 600
    assert trace.rates.tolist() == [120, 180, 30]


def test_columns_that_are_not_needed_are_left_out(tmp_path):
    text = "hour,requests,time\n0,5,0\n0,6,60\n0,7,120\n"
    assert read(written(tmp_path, text)).rates.tolist() == [5, 6, 7]
    text = "timestamp,requests,tokens\n2024-05-12 00:00:00+00:00,5,900\n2024-05-12 00:01:00+00:00,6,800\n"
    assert read(written(tmp_path, text)).rates.tolist() == [5, 6]
    text = "Timestamp,Model,Tokens\n5,large,7\n70,small,8\n80,large,9\n140,large,1\n"
    assert read(written(tmp_path, text)).rates.tolist() == [1, 2]


def test_steps_are_whole_intervals(tmp_path):
    rows = "".join(f"{45 * number},3\n" for number in range(9))
    trace = read(written(tmp_path, "time,requests\n" + rows))
    assert trace.step_s == 90
    np.testing.assert_allclose(trace.rates, [4] * 5)


def test_requests_one_a_row_are_counted_by_minute(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,10,5\n"
    text += "".join(f"2023-11-16 18:{minute}:0{minute % 3}.5,100,20\n" for minute in (18, 18, 18, 20, 21))
    path = written(tmp_path, text)
    assert read(path).rates.tolist() == [4, 0, 1], "the last minute was not recorded whole"
    assert read(path, Work.TOKENS).rates.tolist() == [375, 0, 120]


def test_jsonl_with_milliseconds_or_microseconds(tmp_path):
    lines = [
        f'{{"timestamp": {at}, "input_length": 7, "output_length": 3}}' for at in (0, 61_000, 62_000, 130_000)
    ]
    path = written(tmp_path, "\n".join(lines), "c.jsonl.gz")
    assert read(path).rates.tolist() == [1, 2]
    assert read(path, Work.TOKENS).rates.tolist() == [10, 20]
    lines = [
        f'{{"session": "a", "timestamp_us": {at}000000, "input_chars": 4}}' for at in (60, 125, 130, 190)
    ]
    assert read(written(tmp_path, "\n".join(lines), "d.jsonl")).rates.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "its first line is ''"),
        ("when,count\n1,2\n", "its first line is 'when,count'; a trace is a CSV file"),
        ("time,requests\n0,1\n60,x\n", r":3: 'x' is not a number of 0 or more"),
        ("time,requests\n0,1\n60,-4\n", r":3: '-4' is not a number of 0 or more"),
        ("time,requests\n0,1\n60,nan\n", r":3: 'nan' is not a number of 0 or more"),
        ("time,requests\n0,1\nnoon,2\n", r":3: 'noon' is not a time; write seconds"),
        ("time,requests\n0,1\nnan,2\n", r":3: nan is not a time; write seconds"),
        ("time,work\n0,1\n60,2\n", "its first line is 'time,work'; a trace is a CSV file"),
        ("time,requests\n0,1\n60,2,3\n", r":3: 3 columns; the first line names 2"),
        ("time,requests\n60,1\n0,2\n", r":3: not later than the line before"),
        ("time,requests\n0,1\n", "1 rows; a trace has at least two"),
        ("t,rate\n0,1\n86400,2\n", "intervals of 86400 s"),
        ('{"timestamp": 1}\n{"timestamp": oops}\n', r":2: not JSON"),
        ('{"time": 1}\n', r":1: timestamp \(ms\) or timestamp_us is missing"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
    ],
)
def test_a_bad_trace_says_what_is_wrong_and_where(tmp_path, text, sentence):
    with pytest.raises(TraceError, match=sentence):
        read(written(tmp_path, text))


def test_what_is_not_text_or_damaged_says_so(tmp_path):
    path = tmp_path / "keys.trace"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(TraceError, match="not a text file; a trace is"):
        read(path)
    cut = written(tmp_path, "time,requests\n" + "0,1\n" * 1000, "cut.csv.gz")
    cut.write_bytes(cut.read_bytes()[:20])
    with pytest.raises(TraceError, match=r"cut\.csv\.gz"):
        read(cut)
    with pytest.raises(TraceError, match="records no tokens"):
        read(written(tmp_path, "time,requests\n0,1\n60,2\n"), Work.TOKENS)


@settings(max_examples=200)
@given(st.text(max_size=200))
def test_any_text_is_a_trace_or_an_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "t.csv"
    path.write_text("time,requests\n" + text, encoding="utf-8", errors="surrogatepass")
    try:
        trace = read(path)
    except TraceError:
        return
    known = trace.rates[~np.isnan(trace.rates)]
    assert (known >= 0).all()


rates = st.lists(st.floats(0, 100), min_size=2, max_size=60).map(np.array)
orders = st.lists(st.integers(0, 12), min_size=60, max_size=60)


@given(rates, orders)
def test_no_work_is_lost_and_no_replica_serves_before_its_time(demands, ordered):
    run = simulate(demands, SERVICE, lambda view: ordered[view.step])
    served = np.diff(np.cumsum(demands) - run.waiting, prepend=0.0)
    assert (served <= run.ready * SERVICE.capacity + 1e-6).all()
    assert (run.ready <= run.ordered).all()
    for step in range(SERVICE.delay, len(demands)):
        assert run.ready[step] <= run.ordered[step - SERVICE.delay + 1 : step + 1].min()


@given(rates, orders)
def test_nobody_without_violations_is_cheaper_than_the_clairvoyant(demands, ordered):
    def policy(view):
        return max(ordered[view.step], math.ceil(demands.max() / SERVICE.capacity))

    run, best = simulate(demands, SERVICE, policy), clairvoyant(demands, SERVICE)
    assert (best.ready * SERVICE.capacity >= demands - 1e-6).all()
    whole = slice(0, len(demands))
    # What was there when the trace began was ordered before it, by both.
    assert best.ordered.sum() <= run.ordered.sum() + SERVICE.delay * best.ready.max()
    assert outcome(demands, best, SERVICE, whole).violated_share == 0


def test_the_clairvoyant_is_the_cheapest_of_all_schedules():
    """Compared with an exhaustive search over every schedule of one replica."""
    demands = np.array([0, 0, 0, 5, 0, 0, 5, 0, 0, 0, 0, 5, 0], float)
    delay = SERVICE.delay
    cheapest = math.inf
    for bits in itertools.product((0, 1), repeat=len(demands)):
        ready = [all(bits[max(0, step - delay + 1) : step + 1]) for step in range(len(bits))]
        if all(ready[step] or demand == 0 for step, demand in enumerate(demands)):
            cheapest = min(cheapest, sum(bits))
    assert clairvoyant(demands, SERVICE).ordered.sum() == cheapest


def waves(days=3, step_s=600.0, seed=0):
    chance, day = np.random.default_rng(seed), round(86400 / step_s)
    steps = np.arange(days * day)
    base = 100 * (1 + 0.6 * np.sin(2 * np.pi * steps / day))
    return WorkTrace("waves", 0.0, step_s, base * np.exp(chance.normal(0, 0.05, len(steps))))


def test_policies_are_compared_on_the_part_that_they_were_not_tuned_on():
    trace = waves()
    service = Service(5.0, 0.5, 1, trace.step_s)
    test = scoring.backtest(trace, 1)
    results = compare(trace, service, test.made, 144)
    assert list(results) == ["moe", "static_peak", "hpa", "keda", "knative", "perfect", "clairvoyant"]
    least = results["clairvoyant"].judged.gpu_hours
    assert results["perfect"].judged.violated_share == 0
    assert least <= results["perfect"].judged.gpu_hours <= 1.1 * least
    for name, result in results.items():
        assert 0 < result.judged.utilisation <= 105, name
        again = outcome(trace.rates, result.run, service, slice(144, None))
        assert again == result.judged
    assert results["moe"].judged.gpu_hours < results["static_peak"].judged.gpu_hours


@pytest.mark.parametrize("make", [policies.hpa, policies.keda, policies.knative])
def test_reactive_policies_settle_at_their_target(make):
    demands = np.full(120, 100.0)
    variant = next(v for v in make(SERVICE) if v.knobs["target"] == 0.8)
    run = simulate(demands, SERVICE, variant.make())
    assert run.ordered[-1] in (12, 13), "100 of work at 80 % of 10 a replica"
    assert len(set(run.ordered[-60:])) == 1


def test_unknown_steps_change_nothing():
    demands = np.array([50.0] * 30 + [np.nan] * 20 + [50.0] * 10)
    for make in (policies.hpa, policies.keda, policies.knative):
        run = simulate(demands, SERVICE, make(SERVICE)[10].make())
        assert run.ordered[31:50].min() == run.ordered[31:50].max()
    np.testing.assert_array_equal(filled(np.array([np.nan, 1.0, np.nan])), [1, 1, 1])
