"""The stages of a pipeline compute different steps at the same time, and tokens stay the same."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine import core as core_module
from moe_worker.engine.core import EngineCore
from moe_worker.engine.launching import Launcher
from moe_worker.engine.offline import Engine
from moe_worker.engine.requests import Request
from moe_worker.mesh.errors import RankLostError
from moe_worker.mesh.results import drawn
from moe_worker.mesh.runner import MeshRunner, _pieces
from moe_worker.sampling.drawer import Drawer
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.scheduler.plan import Limits
from tests.checkpoints import write_checkpoint
from tests.worker.simulated import SimulatedEngine

OPTIONS = {"device": "cpu", "dtype": "float32", "threads": 1, "context_length": 256}
FORMAT = OutputFormat("regex", "[a-z]{3,9}-[0-9]{2}")
PROMPTS = [[7 + i % 290 for i in range(40)], [5], [300 - i % 250 for i in range(30)], [9, 8, 7], [11] * 20]


class Staged(MeshRunner):
    """Stands for a mesh of `stages` stages; tells when passes begin and when their logits are wanted."""

    def __init__(self, runner, stages, lost=()):
        self.member = SimpleNamespace(shape=MeshShape(stages, 1), lost=None, returned=(), channels=())
        self.feeds, self.rebalancing, self._homes = False, None, [0]
        self.events, self._runner, self._logits, self._lost = [], runner, [], list(lost)
        self.reformed, self.drawn, self._drawer = 0, 0, Drawer(320, torch.device("cpu"))

    def begin(self, batch, cache, rows, draws):
        self.events.append("begin")
        logits, pieces = self._runner.logits(batch, cache, rows), _pieces(batch, rows, self._homes, draws)
        self.drawn += sum(draw is not None for draw in draws)
        self._logits.append(drawn(logits, pieces, self._drawer))
        return self._collect

    def _collect(self):
        self.events.append("collect")
        if self.events.count("collect") in self._lost:
            raise RankLostError("rank 1 is gone")
        return self._logits.pop(0)

    def reform(self, error):
        assert isinstance(error, RankLostError)
        self._logits.clear()
        self.reformed += 1

    def tend(self):
        pass

    def expert_counter(self):
        return self._runner.expert_counter()


class Ahead(Launcher):
    """Launches steps before the tokens of earlier ones are known, as on GPUs."""

    def __init__(self, loaded):
        super().__init__(loaded)
        self.ahead = True


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return Engine(write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=2), **OPTIONS)._loaded


def submit_all(core):
    """Greedy, seeded and penalized requests; the last stage draws all but the penalized one."""
    for number, prompt in enumerate(PROMPTS):
        sampling = SamplingParameters(
            max_tokens=12 + number, temperature=0.6 * (number % 2), seed=number, ignore_eos=True,
            frequency_penalty=0.5 * (number == 3),
        )  # fmt: skip
        core.submit(Request(number, tuple(prompt), sampling, seed=number))


def take(core, found):
    """Adds the tokens of a step to those of each request."""
    for delta in core.step():
        if delta.token is not None:
            found[delta.id].append(delta.token)


def tokens_of(loaded, **more):
    """Of all requests, with prompts in chunks; and how many steps were in flight at most."""
    core, most = EngineCore(loaded, EngineOptions(prefill_tokens=30, **OPTIONS), **more), 0
    submit_all(core)
    found = [[] for _ in PROMPTS]
    while not core.idle:
        take(core, found)
        most = max(most, len(core._flights))
    assert core.load.kv_tokens_used == 0
    assert core.statistics.output_tokens == sum(map(len, found))
    return found, most


@pytest.mark.parametrize("stages", [2, 3])
def test_steps_of_a_pipeline_overlap_and_give_the_tokens_of_one_process(loaded, stages):
    runner = Staged(loaded.runner, stages)
    found, most = tokens_of(replace(loaded, runner=runner))
    assert found == tokens_of(loaded)[0]
    assert most == stages - 1  # after a step has landed
    assert runner.drawn == sum(map(len, found)) - len(found[3])
    assert runner.events[:stages] == ["begin"] * stages
    assert runner.events[stages : stages + 20] == ["collect", "begin"] * 10


MIXED = (
    ({}, {}),
    ({"logprobs": 2}, {}),
    ({"temperature": 0.7}, {"output_format": FORMAT}),
    ({"prompt_logprobs": 1}, {}),
    ({"temperature": 1.2, "top_k": 20, "min_p": 0.01}, {}),
    ({"temperature": 0.7, "stop_token_ids": (9,), "min_tokens": 5}, {}),
    ({"temperature": 0.7, "logit_bias": ((11, 2.0),)}, {}),
)  # fmt: skip


def mixed(loaded):
    """Tokens, text, and log-probabilities of text and prompt, where requests need different things."""
    core = EngineCore(loaded, EngineOptions(prefill_tokens=60, **OPTIONS))
    for number, (sampling, more) in enumerate(MIXED):
        parameters = SamplingParameters(max_tokens=12 + number, **sampling)
        core.submit(
            Request(number, (*PROMPTS[number % 3], number), parameters, seed=2**64 - 1 - number, **more)
        )
    found = [([], [], [], []) for _ in MIXED]
    while not core.idle:
        for delta in core.step():
            tokens, texts, scores, prompts = found[delta.id]
            tokens += [delta.token] * (delta.token is not None)
            texts += delta.text
            scores += [] if delta.logprobs is None else [delta.logprobs.logprob]
            prompts += [each.logprob for each in delta.prompt]
    return found


@pytest.mark.parametrize("stages", [1, 3])
def test_drawn_tokens_share_steps_with_all_others(loaded, stages):
    runner = Staged(loaded.runner, stages)
    found, alone = mixed(replace(loaded, runner=runner)), mixed(loaded)
    for ours, theirs in zip(found, alone, strict=True):
        assert ours[:2] == theirs[:2]
        for scores, expected in zip(ours[2:], theirs[2:], strict=True):
            assert scores == pytest.approx(expected, abs=1e-4)
    assert re.fullmatch(FORMAT.text, "".join(found[2][1]))
    assert (len(found[1][2]), len(found[3][3])) == (len(found[1][0]), len(PROMPTS[0]))
    waiting = min(5, len(found[5][0]))
    assert runner.drawn == sum(len(found[number][0]) for number in (0, 4, 5)) - waiting


def test_one_micro_batch_waits_for_the_last_stage(loaded):
    runner = Staged(loaded.runner, 2)
    assert tokens_of(replace(loaded, runner=runner), micro_batches=1)[0] == tokens_of(loaded)[0]
    assert runner.events == ["begin", "collect"] * (len(runner.events) // 2)


def test_a_rank_that_is_lost_with_steps_in_flight_costs_no_token(loaded):
    runner = Staged(loaded.runner, 3, lost=(3, 9, 20))
    assert tokens_of(replace(loaded, runner=runner))[0] == tokens_of(loaded)[0]
    assert runner.reformed == 3


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_text_ends_where_its_format_does_however_many_steps_are_ahead(loaded, stages, monkeypatch, caplog):
    def texts(loaded, **more):
        """One after the other: with others, a stream has fewer steps in flight."""
        core, found = EngineCore(loaded, EngineOptions(**OPTIONS), **more), ["", "", ""]
        for number in range(len(found)):
            sampling = SamplingParameters(max_tokens=40, temperature=0.7, seed=number)
            core.submit(Request(number, (5, 6, 7), sampling, number, output_format=FORMAT))
            while not core.idle:
                for delta in core.step():
                    found[delta.id] += delta.text
        return found

    alone = texts(loaded)
    monkeypatch.setattr(core_module, "Launcher", Ahead)
    ahead = texts(replace(loaded, runner=Staged(loaded.runner, stages)), micro_batches=stages)
    assert all(re.fullmatch(FORMAT.text, text) for text in alone)
    assert ahead == alone
    assert "fails" not in caplog.text


def streams(count, **limits):
    """An engine whose prompts are computed; their last tokens are in flight."""
    choices = {"sequences": 8, "waiting": 0, "pages": 64, "page_size": 4, "prefill_tokens": 64} | limits
    engine = SimulatedEngine(Limits(**choices))
    for number in range(count):
        engine.submit(number, [number % 3] * 4, 30)
    engine.step()
    return engine


def planned(engine):
    step = engine.plan().step
    return None if step is None else [chunk.id for chunk in step.chunks]


def test_micro_batches_take_turns():
    engine = streams(5, micro_batches=2)
    assert planned(engine) == [0, 1, 2]
    for _ in range(3):
        assert planned(engine) == [3, 4]
        engine.complete()
        assert planned(engine) == [0, 1, 2]
        engine.complete()
    engine.drain()


def test_few_streams_stay_together():
    engine = streams(3, micro_batches=2, least_streams=2)
    assert planned(engine) == [0, 1]
    assert planned(engine) == [2]
    engine.complete()
    assert planned(engine) == [0, 1]
    engine.drain()
    engine = streams(3, micro_batches=2, least_streams=4)
    for _ in range(3):
        assert planned(engine) == [0, 1, 2]
    engine.drain()


@pytest.mark.parametrize(
    ("number_format", "count", "largest"),
    [("w4a8", 256, 128), ("w4a8", 64, 64), ("bf16", 64, 32), ("bf16", 10, 8), ("fp8", 64, 64)],
)
def test_on_gpus_streams_are_divided_where_parts_pay(loaded, monkeypatch, number_format, count, largest):
    monkeypatch.setattr(core_module, "Launcher", Ahead)
    staged = replace(loaded, runner=Staged(loaded.runner, 2), format=number_format)
    core = EngineCore(staged, EngineOptions(max_batch_size=count, prefill_tokens=count, **OPTIONS))
    for number in range(count):
        core.submit(Request(number, (7,), SamplingParameters(max_tokens=8, ignore_eos=True), seed=number))
    deltas = []
    while not core.idle:
        deltas.append(len(core.step()))
    assert max(deltas[6:]) == largest


@pytest.mark.parametrize("ahead", [True, False])
def test_a_lone_stream_waits_for_its_token_only_where_the_host_must_know_it(ahead):
    engine = streams(1, micro_batches=2, ahead=ahead)
    assert planned(engine) == [0]
    assert planned(engine) == ([0] if ahead else None)
    engine.drain()


def test_new_prompts_fill_the_stages_while_all_streams_are_under_way():
    engine = streams(1, micro_batches=2, ahead=False)
    assert planned(engine) == [0]
    engine.submit(1, [1] * 4, 5)
    assert planned(engine) == [1]
    engine.drain()


@pytest.mark.parametrize("pages", range(12, 17))
def test_a_stream_takes_the_turn_of_one_that_is_preempted(pages):
    engine = streams(0, micro_batches=2, sequences=2, pages=pages, page_size=2, prefill_tokens=6)
    for number in range(2):
        engine.submit(number, [number] * 11, 9)
    while len(engine.ended) < 2:
        assert planned(engine) is not None
        engine.complete()


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_a_request_that_is_cancelled_before_its_step_is_sampled_disturbs_no_other(loaded, steps):
    alone = tokens_of(loaded)[0]
    for gone in range(len(PROMPTS)):
        core = EngineCore(
            replace(loaded, runner=Staged(loaded.runner, 3)), EngineOptions(prefill_tokens=30, **OPTIONS)
        )
        found = [[] for _ in PROMPTS]
        submit_all(core)
        for _ in range(steps):
            take(core, found)
        core.cancel(gone)
        while not core.idle:
            take(core, found)
        for number, tokens in enumerate(found):
            assert tokens == alone[number][: len(tokens) if number == gone else None]
        assert core.load.kv_tokens_used == 0
        assert not core._launcher._sampler._rows
