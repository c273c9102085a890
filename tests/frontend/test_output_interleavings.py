"""The output cache against a model: any interleaving of requests, cancellations, deaths and rollouts."""

import asyncio
import contextlib
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from opentelemetry.trace import INVALID_SPAN

from moe_api.inference.v1 import inference_pb2
from moe_api.supervision import Backoff, Supervisor
from moe_api.writing import SlowReaderError, Writer
from moe_frontend.outputs.cache import OutputCache
from moe_frontend.outputs.key import key_of
from moe_frontend.outputs.store import Store

TOKENS = 3
REVISIONS = ("r1", "r2")


@dataclass
class Client:
    """What one client asked for, and what it got."""

    question: str
    revisions: set
    """That were served at some time while it waited."""
    messages: list = field(default_factory=list)
    task: asyncio.Task = None

    def invocation_metadata(self):
        return ()

    def set_trailing_metadata(self, trailing_metadata):
        pass

    async def send_initial_metadata(self, initial_metadata):
        pass

    async def write(self, message):
        self.messages.append(inference_pb2.GenerateResponse.FromString(message))

    @property
    def text(self):
        return "".join(message.text for message in self.messages)


@dataclass
class Work:
    """A computation on a worker of one revision; `steps`: None is a token, else what befalls it."""

    question: str
    revision: str
    steps: asyncio.Queue
    ended: bool = False


class Interleavings(RuleBasedStateMachine):
    """A computation's text names tenant, prompt, seed and revision, so every wrong answer shows."""

    @initialize()
    def begin(self):
        self.loop = asyncio.new_event_loop()
        # Without a pause: what runs next must not depend on how busy the machine is.
        self.supervisor = Supervisor(backoff=Backoff(first_s=0.0), expected=(ZeroDivisionError,))
        self.now = 0.0
        self.store = Store(3000, 10.0, lambda: self.now)
        self.cache = OutputCache(self.store, self.supervisor, "stopped")
        self.clients, self.works = [], []
        self.roll_out({"r1"})

    def teardown(self):
        if hasattr(self, "loop"):
            self.loop.run_until_complete(self.supervisor.close())
            self.loop.close()

    def settle(self):
        async def turns():
            for _ in range(20):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    async def compute(self, question, flight):
        work = Work(question, sorted(self.served)[0], asyncio.Queue())
        self.works.append(work)
        try:
            for number in range(TOKENS):
                while (death := await work.steps.get()) == "moves":  # before its first token, to any revision
                    work.revision = sorted(self.served)[-1] if number == 0 else work.revision
                if death == "raises":
                    raise ZeroDivisionError
                if death is not None:
                    return death, work.revision
                last = number == TOKENS - 1
                text = f"{question}/{work.revision};" if number == 0 else "."
                finish = inference_pb2.FINISH_REASON_STOP if last else None
                message = inference_pb2.GenerateResponse(text=text, tokens=[number], finish_reason=finish)
                await flight.write(message.SerializeToString())
            return None, work.revision
        finally:
            work.ended = True

    @rule(tenant=st.sampled_from("ab"), prompt=st.sampled_from("pq"), seed=st.integers(0, 1))
    def ask(self, tenant, prompt, seed):
        request = inference_pb2.GenerateRequest(prompt=prompt, sampling={"seed": seed})
        only = next(iter(self.served)) if len(self.served) == 1 else ""
        key = key_of(request, [("authorization", tenant)], only, samples=True)
        if key is None:  # during a rollout nothing comes from the cache
            return
        question = f"{tenant}/{prompt}/{seed}"
        client = Client(question, set(self.served))
        answer = self.cache.answer(
            key, (), client, Writer(client, 30.0), INVALID_SPAN, lambda flight: self.compute(question, flight)
        )
        client.task = self.loop.create_task(answer)
        self.clients.append(client)
        self.settle()

    def running(self):
        return [work for work in self.works if not work.ended]

    @precondition(lambda self: self.running())
    @rule(data=st.data(), step=st.sampled_from((None, None, None, None, "died", "raises", "moves")))
    def work_on(self, data, step):
        work = data.draw(st.sampled_from(self.running()))
        work.steps.put_nowait(step)
        self.settle()

    @precondition(lambda self: any(not client.task.done() for client in self.clients))
    @rule(data=st.data())
    def cancel(self, data):
        client = data.draw(st.sampled_from([one for one in self.clients if not one.task.done()]))
        client.task.cancel()
        self.settle()

    @rule(served=st.sets(st.sampled_from(REVISIONS), min_size=1))
    def roll_out(self, served):
        self.served = frozenset(served)
        self.cache.serve(self.served)
        for client in self.clients:
            if not client.task.done():
                client.revisions |= self.served

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def every_answer_is_that_of_its_question(self):
        for client in getattr(self, "clients", ()):
            wanted = [f"{client.question}/{revision};.." for revision in client.revisions]
            assert any(whole.startswith(client.text) for whole in wanted)
            if not client.task.done() or client.task.cancelled():
                continue
            answered, failure = client.task.result()
            assert answered
            assert failure is not None or client.text in wanted

    @invariant()
    def nothing_runs_for_nobody(self):
        if hasattr(self, "loop"):
            waiting = {client.question for client in self.clients if not client.task.done()}
            assert {work.question for work in self.running()} <= waiting
            assert len(self.cache._flights) <= len(self.running())
            assert self.store.bytes <= 3000


class Deaf(Client):
    """Reads nothing, until its writer gives up."""

    async def write(self, message):
        await asyncio.Event().wait()


async def test_clients_that_take_turns_in_reading_nothing_do_not_hold_a_computation():
    """One that comes in time before the last one has given up would keep it open for ever."""
    supervisor, patience_s = Supervisor(), 0.3
    cache = OutputCache(Store(3000, 10.0), supervisor, "stopped", patience_s)
    cache.serve(frozenset({"r1"}))
    begun, ended = [], []

    async def compute(flight):
        begun.append(flight)
        try:
            while True:
                await flight.write(b"token")
        finally:
            ended.append(flight)

    async def deaf():
        caller = Deaf("q", {"r1"})
        with contextlib.suppress(SlowReaderError):
            await cache.answer(b"key", (), caller, Writer(caller, patience_s), INVALID_SPAN, compute)

    clients = [asyncio.create_task(deaf())]
    async with asyncio.timeout(60):
        while not ended:
            await asyncio.sleep(patience_s / 3)
            clients.append(asyncio.create_task(deaf()))
    assert ended[0] is begun[0]
    await asyncio.gather(*clients)
    assert begun == ended
    assert not cache._flights
    await supervisor.close()


def test_who_asks_after_a_rollback_follows_no_answer_of_the_other_revision():
    state = Interleavings()
    state.begin()
    try:
        state.ask(tenant="a", prompt="p", seed=1)
        state.roll_out({"r1", "r2"})
        (work,) = state.running()
        work.steps.put_nowait("moves")
        state.settle()
        state.roll_out({"r1"})
        work.steps.put_nowait(None)
        state.settle()
        state.ask(tenant="a", prompt="p", seed=1)
        state.every_answer_is_that_of_its_question()
        assert [one.revision for one in state.running()] == ["r2", "r1"]
    finally:
        state.teardown()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
