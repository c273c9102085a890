"""Texts have the format that a request asks for, in any batch, from any step on; hostile ones are refused."""

import gc
import json
import queue
import re
import threading
from types import SimpleNamespace
from unittest import mock

import grpc
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2
from moe_worker.config.engine import EngineOptions
from moe_worker.engine import loading
from moe_worker.engine.core import EngineCore
from moe_worker.engine.guiding import StepGuides
from moe_worker.engine.requests import FinishReason, Request
from moe_worker.errors import RequestError
from moe_worker.sampling import guides
from moe_worker.sampling.grammar import check, grammar_of
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service import engine_process
from moe_worker.service.wire import Start
from tests.checkpoints import write_checkpoint
from tests.worker.mask_cases import CPU, PERSON, ROWS, SCHEMA, check_masked_scores, check_shared_lexer
from tests.worker.serving import Worker

EXPRESSION = OutputFormat("regex", r"[a-z]{3,9}-[0-9]{2}")
PROMPT = (5, 6, 7, 5)


def validate(text, schema):
    """Raises an error if `text` is not JSON of `schema`."""
    import jsonschema  # noqa: PLC0415 - imports a grammar for seconds, in each process that collects tests

    jsonschema.validate(json.loads(text), schema)


def texts(engine, output_format, count=4, flights=None, max_tokens=480, written=()):
    """(text, finish reason, tokens) of seeded samples in one batch, and of one free text next to them."""
    core = EngineCore(engine._loaded, EngineOptions(threads=1, max_batch_size=8), flights=flights)
    for number in range(count + 1):
        sampling = SamplingParameters(max_tokens=max_tokens, temperature=1.5, seed=number)
        wanted = output_format if number < count else None
        core.submit(Request(number, PROMPT, sampling, number, written=written, output_format=wanted))
    found = {number: ["", None, []] for number in range(count + 1)}
    while not core.idle:
        for delta in core.step():
            entry = found[delta.id]
            entry[0] += delta.text
            entry[1] = delta.finish_reason
            entry[2] += [] if delta.token is None else [delta.token]
    return [found[number] for number in range(count + 1)]


@pytest.mark.parametrize("flights", [1, 2])
def test_every_text_of_a_batch_has_its_format(engine, flights):
    for text, reason, _ in texts(engine, SCHEMA, flights=flights)[:-1]:
        assert reason is FinishReason.STOP
        validate(text, PERSON)
    for text, reason, _ in texts(engine, EXPRESSION, flights=flights)[:-1]:
        assert reason is FinishReason.STOP
        assert re.fullmatch(EXPRESSION.text, text)


def test_a_format_changes_no_other_text(engine):
    [*_, beside] = texts(engine, SCHEMA)
    [*_, alone] = texts(engine, None)
    assert beside == alone


def test_steps_ahead_of_their_tokens_give_the_same_texts(engine):
    assert texts(engine, SCHEMA, flights=2) == texts(engine, SCHEMA, flights=1)


def test_a_stream_that_is_taken_up_keeps_its_format(engine):
    [whole, *_] = texts(engine, SCHEMA, count=1)
    for cut in range(1, len(whole[2]) - 1, 1 + len(whole[2]) // 5):
        [rest, *_] = texts(engine, SCHEMA, count=1, written=tuple(whole[2][:cut]))
        assert whole[2] == [*whole[2][:cut], *rest[2]]


def test_masks_do_not_wait_for_a_format_that_is_being_compiled(engine, monkeypatch):
    found, goes_on = engine._loaded, threading.Event()
    masks = guides.Guides(found.tokenizer, found.config.vocab_size, found.config.eos_token_ids, threads=1)
    ready = masks.open(SCHEMA, ())
    ready.matcher.result()

    def slow(output_format):
        assert goes_on.wait(30)
        return grammar_of(output_format)

    monkeypatch.setattr(guides, "grammar_of", slow)
    compiling = masks.open(EXPRESSION, ())
    masks.masks([(0, ready)], torch.device("cpu"))
    assert not compiling.matcher.done()
    goes_on.set()
    compiling.matcher.result(30)


def opened(engine, count, monkeypatch, salts=("",)):
    """Guides of `count` texts of one format with each of `salts`, and how often it was compiled."""
    found, compiled = engine._loaded, []
    monkeypatch.setattr(guides, "grammar_of", lambda wanted: compiled.append(wanted) or grammar_of(wanted))
    masks = guides.Guides(found.tokenizer, found.config.vocab_size, found.config.eos_token_ids, threads=1)
    texts = [masks.open(SCHEMA, (), salt) for _ in range(count) for salt in salts]
    for text in texts:
        text.matcher.result()
    return masks, texts, compiled


def test_texts_of_a_format_share_its_lexer_with_few_others_of_their_salt(engine, monkeypatch):
    count = 2 * guides.TEXTS_OF_A_LEXER + 1
    masks, texts, compiled = opened(engine, count, monkeypatch, salts=("one", "two"))
    assert len(compiled) == 2 * 3
    del texts
    masks.open(SCHEMA, (), "one").matcher.result()
    assert len(compiled) == 2 * 3 + 1


@pytest.mark.parametrize("threads", [1, 3])
def test_a_shared_lexer_gives_the_masks_of_one_of_its_own(engine, threads):
    check_shared_lexer(engine, threads, CPU)


def test_no_text_begins_with_a_lexer_that_became_too_complex(engine, monkeypatch):
    masks, [text], compiled = opened(engine, 1, monkeypatch)
    text.own.consume_token(PROMPT[0])  # no JSON begins so
    assert not masks.masks([(0, text)], torch.device("cpu")).bits_MB.any()
    other = masks.open(SCHEMA, ())
    assert masks.masks([(0, other)], torch.device("cpu")).bits_MB.any()
    assert len(compiled) == 2


def test_a_text_whose_step_is_undone_keeps_to_the_lexers_of_its_salt():
    opened = mock.Mock()
    loaded = SimpleNamespace(tokenizer=None, device=None, guides=SimpleNamespace(open=opened))
    request = Request(1, PROMPT, SamplingParameters(), 0, output_format=SCHEMA, salt="tenant")
    active = SimpleNamespace(request=request, guide=object(), output=(8, 9))
    StepGuides(loaded).undo(SimpleNamespace(guided=True, sampling=[(0, active)]))
    opened.assert_called_once_with(SCHEMA, (8, 9), "tenant")
    assert active.guide is opened.return_value


def test_the_first_format_of_a_prepared_vocabulary_does_not_read_it(engine, monkeypatch):
    found = engine._loaded
    masks = guides.Guides(found.tokenizer, found.config.vocab_size, found.config.eos_token_ids, threads=1)
    masks.prepare()
    monkeypatch.setattr(guides, "_Tokens", None)
    assert masks.open(SCHEMA, ()).own


def test_a_model_without_an_end_of_text_token_has_no_vocabulary_to_prepare(engine):
    guides.Guides(engine._loaded.tokenizer, 10, (), threads=1).prepare()


def test_a_vocabulary_that_cannot_be_prepared_is_told(engine, caplog):
    guides.Guides(engine._loaded.tokenizer, -1, (2,), threads=1).prepare()
    assert "output formats cannot be used with this vocabulary" in caplog.text


@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_a_worker_prepares_the_vocabulary_before_it_meets_ranks_and_is_ready(tmp_path, monkeypatch, mesh):
    """It can send no heartbeat meanwhile. Its engine tells that it is ready by what it sends."""
    done = mock.Mock()
    done.join.side_effect = done.sender.send.side_effect = InterruptedError
    monkeypatch.setattr(loading.Spread, "join", done.join)
    monkeypatch.setattr(guides.Guides, "prepare", done.prepare)
    monkeypatch.setattr(gc, "freeze", done.freeze)
    options = EngineOptions(device="cpu", mesh=mesh, mesh_leader="127.0.0.1:1" if mesh != "1x1" else "")
    inbox = queue.SimpleQueue()
    inbox.put(Start(str(write_checkpoint(tmp_path)), options))
    monkeypatch.setattr(engine_process.queue, "SimpleQueue", lambda: inbox)
    monkeypatch.setattr(engine_process, "_receive", lambda *_: None)
    with pytest.raises(InterruptedError):
        engine_process._serve(None, done.sender)
    after = ["join"] if mesh == "1x2" else ["freeze", "sender.send"]
    assert [name for name, _, _ in done.mock_calls] == ["prepare", *after]


@pytest.mark.parametrize("rows", ROWS)
def test_masks_leave_the_scores_of_allowed_tokens_alone(rows):
    check_masked_scores(rows, CPU)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_scheduler_learns_what_masks_of_each_tenant_took(engine, monkeypatch, threads):
    found = engine._loaded
    masks = guides.Guides(found.tokenizer, found.config.vocab_size, found.config.eos_token_ids, threads)
    monkeypatch.setitem(vars(found), "guides", masks)
    core = EngineCore(found, EngineOptions(threads=1, max_batch_size=8))
    for number, tenant in enumerate(("one", "two", "none")):
        wanted = EXPRESSION if tenant != "none" else None
        core.submit(
            Request(number, PROMPT, SamplingParameters(max_tokens=9), 0, tenant=tenant, output_format=wanted)
        )
    while not all(core._active[number].generated for number in range(3)):
        core.step()
    tenants = core._scheduler._policy._tenants.live
    assert tenants["one"].mask_s > 0
    assert tenants["two"].mask_s > 0
    assert tenants["none"].mask_s is None


@pytest.mark.parametrize("flights", [1, 2])
def test_texts_that_pause_for_other_tenants_stay_the_same(engine, monkeypatch, flights):
    """Their masks seem to take a second each, so the other tenant's stream is alone in most steps."""

    def run(tenant):
        core = EngineCore(engine._loaded, EngineOptions(threads=1, max_batch_size=8), flights=flights)
        for number in range(4):
            sampling = SamplingParameters(max_tokens=12, temperature=1.5, seed=number)
            core.submit(Request(number, PROMPT, sampling, number, tenant=tenant, output_format=SCHEMA))
        core.submit(Request(9, PROMPT, SamplingParameters(max_tokens=60, ignore_eos=True), 9, tenant="guest"))
        made, pauses = {number: [] for number in (*range(4), 9)}, 0
        while not core.idle:
            deltas = core.step()
            for delta in deltas:
                made[delta.id] += [] if delta.token is None else [delta.token]
            pauses += [delta.id for delta in deltas] == [9] and len(core._active) > 1
        return made, pauses

    alone, pauses = run("guest")
    assert pauses == 0
    monkeypatch.setattr(guides.Guide, "take_seconds", lambda _: 1.0)
    beside, pauses = run("slow")
    assert beside == alone
    assert pauses > 30


class TimedMasks:
    """Masks of two texts of a hostile tenant and two of a guest, in two threads, by a pretended clock: those
    of the first take `slow_s`. calls: texts of each call. seconds: of each text; both by step.
    """

    def __init__(self, engine, monkeypatch):
        found = engine._loaded
        ends = found.config.eos_token_ids
        self._guides = guides.Guides(found.tokenizer, found.config.vocab_size, ends, threads=2)
        self.slow_s, self.calls, self.seconds = 0.02, [], []
        self._texts = [self._guides.open(SCHEMA, (), owner) for owner in ("hostile", "guest") * 2]
        for text, owner in zip(self._texts, ("hostile", "guest") * 2, strict=True):
            text.owner = owner
        self._hostile = [self._texts[0].own, self._texts[2].own]
        executor = SimpleNamespace(unsafe_compute_mask_ptr=self._compute)
        monkeypatch.setattr(self._guides, "_executor", executor, raising=False)
        self._now = 0.0
        monkeypatch.setattr(guides, "time", SimpleNamespace(monotonic=lambda: self._now))

    def _compute(self, matchers, *_):
        self.calls[-1].append(len(matchers))
        self._now += self.slow_s if any(matcher in self._hostile for matcher, _ in matchers) else 1e-4

    def step(self, owners=("hostile", "guest")):
        self.calls.append([])
        texts = [text for text in self._texts if text.owner in owners]
        self._guides.masks(list(enumerate(texts)), torch.device("cpu"))
        self.seconds.append([text.take_seconds() for text in self._texts])


def test_slow_masks_of_an_owner_are_measured_apart_now_and_then(engine, monkeypatch):
    """In other steps all texts share the threads, and the time is divided as it was measured."""
    masks, between = TimedMasks(engine, monkeypatch), guides.MEASURED_STEPS - 1
    for _ in range(3 + between):
        masks.step()
    assert masks.calls == [[4], [2, 2], *[[4]] * between, [2, 2]]
    assert len(set(masks.seconds[0])) == 1  # not known yet
    for first, guest, second, _ in masks.seconds[1:]:
        assert guest < 0.0001
        assert first == second == pytest.approx(0.01, rel=0.01)
    masks.slow_s = 0.0
    for _ in range(2 * between):
        masks.step()
    assert masks.calls[-2 * between :] == [[4]] * 2 * between


def test_slow_masks_in_few_steps_are_measured_apart_too(engine, monkeypatch):
    """As those of a tenant that pauses in most."""
    masks = TimedMasks(engine, monkeypatch)
    for number in range(20):
        masks.step(("hostile", "guest") if number % 4 == 0 else ("guest",))
    assert max(guest for _, guest, *_ in masks.seconds[1:]) < 0.0002


def test_the_format_begins_after_a_text(engine):
    after = OutputFormat("regex", "[0-9]{3}", after="e")
    [text, reason, _] = texts(engine, after, count=1)[0]
    assert reason is FinishReason.STOP
    assert re.fullmatch(r"[^e]*e[^0-9]*[0-9]{3}", text, re.DOTALL)


def test_no_text_ends_before_its_format_begins(engine):
    bias = tuple((end, 100.0) for end in engine.config.eos_token_ids)
    ending = SamplingParameters(max_tokens=480, temperature=1.5, logit_bias=bias)
    core = EngineCore(engine._loaded, EngineOptions(threads=1, max_batch_size=8))
    core.submit(Request(0, PROMPT, ending, 0, output_format=OutputFormat("regex", "[0-9]{3}", after="e")))
    deltas = []
    while not core.idle:
        deltas += core.step()
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert re.search(r"e[^0-9]*[0-9]{3}$", "".join(delta.text for delta in deltas))


@pytest.mark.parametrize(("expression", "wanted"), [("", ""), ("(?:)", ""), (r"a/\\\\", r"a/\\")])
def test_a_text_is_matched_by_its_expression_whatever_llguidance_writes_around_it(engine, expression, wanted):
    [text, reason, _] = texts(engine, OutputFormat("regex", expression), count=1)[0]
    assert (text, reason) == (wanted, FinishReason.STOP)


BOUNDED = {"type": "integer", "maximum": 2**63 - 1}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "maximum": 10**29 + 1},
        {"const": 10**21},
        {"enum": [2**53, -(2**53)]},
        {"type": "object", "properties": {"const": BOUNDED, "enum": BOUNDED}},
    ],
)
def test_large_integers_are_taken_where_no_text_would_have_another_one(schema):
    assert check(OutputFormat("json_schema", json.dumps(schema))).problem == ""


def test_the_library_refuses_a_format_that_it_cannot_compile(engine):
    with pytest.raises(RequestError, match=r"output_format\.regex is not supported"):
        engine.generate("x", output_format=OutputFormat("regex", "["))


VALUES = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -9, "maximum": 99},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["x", 1]},
        ]
    )
    | st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    lambda inner: (
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 2))
        | st.builds(
            lambda values: {
                "type": "object",
                "properties": values,
                "required": sorted(values),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        )
    ),
    max_leaves=4,
)


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(schema=VALUES)
def test_texts_satisfy_any_schema(engine, schema):
    [text, reason, _] = texts(engine, OutputFormat("json_schema", json.dumps(schema)), count=1)[0]
    assert reason is FinishReason.STOP
    validate(text, schema)


@pytest.fixture(scope="module")
def serving(checkpoint):
    with Worker(checkpoint) as worker:
        worker.wait_ready()
        yield worker


def ask(worker, sampling=None, **output_format):
    request = inference_pb2.GenerateRequest(
        prompt="hello",
        sampling=sampling or inference_pb2.SamplingParameters(max_tokens=200, temperature=1, seed=1),
        output_format=inference_pb2.OutputFormat(**output_format),
    )
    return "".join(response.text for response in worker.inference.Generate(request, timeout=60))


def test_a_served_text_has_its_format(serving):
    validate(ask(serving, json_schema=SCHEMA.text), PERSON)
    assert re.fullmatch("[ab]{4}", ask(serving, regex="[ab]{4}"))


ALTERNATIVES = {
    "allOf": [{"anyOf": [{"pattern": f"^a{{{n}}}b*"}, {"pattern": f"^c{{{n}}}"}]} for n in range(24)],
    "type": "string",
}
REFUSED = {
    "no kind": ({}, "output_format", "set json_object"),
    "false": ({"json_object": False}, "output_format", "set json_object"),
    "not JSON": ({"json_schema": "{"}, "output_format.json_schema", "not valid JSON"),
    "an unknown keyword": ({"json_schema": '{"not": {}}'}, "output_format.json_schema", "not"),
    "no number": ({"json_schema": '{"const": NaN}'}, "output_format.json_schema", "NaN is not a number"),
    "more than a float": ({"json_schema": '{"const": 1e999}'}, "output_format.json_schema", "too large"),
    "many digits": (
        {"json_schema": f'{{"const": {"9" * 5000}}}'},
        "output_format.json_schema",
        "too large",
    ),
    "an integer that no float has": (
        {"json_schema": '{"items": {"enum": [1, [1234567890123456789]]}}'},
        "output_format.json_schema",
        "has 1234567890123456789 in enum, which would be written as 1234567890123456800",
    ),
    "a power of two that has shorter digits": (
        {"json_schema": '{"const": 18446744073709551616}'},
        "output_format.json_schema",
        "written as 18446744073709552000",
    ),
    "a text in JSON": ({"json_schema": '"{}"'}, "output_format.json_schema", "not a JSON object"),
    "of itself": ({"json_schema": '{"$ref": "#"}'}, "output_format.json_schema", "no text satisfies"),
    "a bad expression": ({"regex": "["}, "output_format.regex", "unclosed character class"),
    "half an escape": ({"regex": "a\\\\\\"}, "output_format.regex", "escapes nothing"),
    "another file": ({"json_schema": '{"$ref": "http://127.0.0.1/x"}'}, "output_format.json_schema", "not"),
    "a long schema": ({"json_schema": " " * 65_537}, "output_format.json_schema", "65536 at most"),
    "deep": ({"json_schema": "[" * 60_000}, "output_format.json_schema", "JSON"),
    "exponential": ({"json_schema": json.dumps(ALTERNATIVES)}, "output_format.json_schema", "not supported"),
}


@pytest.mark.parametrize(("output_format", "field", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_a_format_is_refused(serving, output_format, field, words):
    with pytest.raises(grpc.RpcError) as caught:
        ask(serving, **output_format)
    [violation] = rich_status.field_violations(rich_status.from_error(caught.value))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violation.field == field
    assert words in violation.description
    assert re.fullmatch("[ab]{4}", ask(serving, regex="[ab]{4}"))


def test_a_format_that_becomes_too_complex_ends_its_text_alone(serving):
    with pytest.raises(grpc.RpcError, match="too complex"):
        ask(serving, regex="(.{1,1000}){1,1000}")
    assert re.fullmatch("[ab]{4}", ask(serving, regex="[ab]{4}"))


def test_a_text_that_never_ends_has_no_format(worker):
    sampling = inference_pb2.SamplingParameters(max_tokens=4, ignore_eos=True)
    with pytest.raises(grpc.RpcError) as caught:
        ask(worker, sampling, json_object=True)
    found = rich_status.field_violations(rich_status.from_error(caught.value))
    assert [it.field for it in found] == ["output_format", "output_format"]
    assert "ignore_eos" in found[0].description
    assert "end-of-text" in found[1].description
