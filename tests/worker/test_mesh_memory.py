"""A rank without memory: the sentence names it, steps become smaller, and no other rank waits for ever."""

import contextlib
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine import loading
from moe_worker.engine.core import EngineCore
from moe_worker.engine.offline import Engine
from moe_worker.errors import DeviceMemoryError, WorkerError
from moe_worker.mesh.errors import RankFailedError, RankLostError, RankMemoryError
from moe_worker.mesh.joining import Identity
from moe_worker.mesh.member import Member
from moe_worker.mesh.messages import CODEC, RankFailed
from moe_worker.mesh.part import share_of
from moe_worker.mesh.rank_stage import ModelStage
from moe_worker.mesh.runner import MeshCounter, MeshRunner
from moe_worker.models.safetensors import stored_tensors
from moe_worker.models.stage import Stage
from tests.checkpoints import write_checkpoint
from tests.worker.mesh_ranks import follow, followers, free_address
from tests.worker.test_rebalance import OPTIONS, generate

pytestmark = pytest.mark.timeout(120)
KNOWN_S = 20.0
"""Far below the 60 s that a rank would wait for another one in an exchange, on a busy machine."""
TOO_MUCH = 1 << 50
PROMPTS = [[7 + i % 290 for i in range(40)], [300 - i % 250 for i in range(30)], [5]]


def tokens(engine, **options):
    return generate(EngineCore(engine._loaded, EngineOptions(**options)), PROMPTS, 24)


def cramped(most):
    """From now on no rank of this process has memory for its part of a step of more than `most` tokens."""
    compute = ModelStage.compute

    def refuse(self, width, batch, *others):
        if len(batch.tokens) > most:
            torch.empty(TOO_MUCH, dtype=torch.uint8)  # a genuine failure of the allocator
        return compute(self, width, batch, *others)

    return mock.patch.object(ModelStage, "compute", refuse)


def follow_cramped(checkpoint, options):
    with cramped(options.pop("room")):
        follow(checkpoint, options)


def no_room(*_, **__):
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def follow_without_room(checkpoint, options):
    with mock.patch.object(loading, "load_model", no_room):
        follow(checkpoint, options)


@contextlib.contextmanager
def mesh_of(tmp_path, shape, target, room):
    """The checkpoint, options of the leader, and the other ranks, which run `target`."""
    checkpoint = write_checkpoint(tmp_path, num_hidden_layers=2)
    mesh = {"mesh": shape, "mesh_leader": free_address(), "prefill_tokens": 32, **OPTIONS}
    others = followers(checkpoint, EngineOptions(**mesh).mesh_shape.ranks, target, **mesh, **room)
    try:
        yield checkpoint, mesh, others
    finally:
        others.kill()


@pytest.mark.parametrize("shape", ["1x2", "2x1"])
@pytest.mark.parametrize("who", ["the leader", "another rank"])
def test_a_rank_without_memory_for_large_steps_gets_smaller_ones(tmp_path, patient, caplog, shape, who):
    leads = who == "the leader"
    target, room = (follow, {}) if leads else (follow_cramped, {"room": 10})
    with mesh_of(tmp_path, shape, target, room) as (checkpoint, mesh, _):
        expected = tokens(Engine(checkpoint, **OPTIONS), **OPTIONS)
        engine = Engine(checkpoint, **mesh)
        with contextlib.closing(engine._loaded.member), cramped(10) if leads else contextlib.nullcontext():
            begin = time.monotonic()
            assert tokens(engine, **mesh) == expected
            assert time.monotonic() - begin < KNOWN_S
            said = [record.message for record in caplog.records if "has no memory" in record.message]
            assert said
            assert all(f"rank {0 if leads else 1} has no memory for a step of" in each for each in said)
            assert any("going on with smaller steps" in each for each in said)


def test_a_rank_without_memory_for_one_token_ends_the_engine_by_its_number(tmp_path, patient):
    with mesh_of(tmp_path, "1x2", follow_cramped, {"room": 0}) as (checkpoint, mesh, _):
        engine = Engine(checkpoint, **mesh)
        with contextlib.closing(engine._loaded.member):
            begin = time.monotonic()
            with pytest.raises(DeviceMemoryError, match="rank 1 has no memory left for a step of one token"):
                tokens(engine, **mesh)
            assert time.monotonic() - begin < KNOWN_S


def unsent(_):
    raise RankLostError("rank 1: connection lost")


def member_that_lacks_memory():
    """Of the leader of 1x2, to whose rank nothing can be sent any more."""
    member = Member(
        Identity(MeshShape(1, 2), 1, "digest", b"known"), 0, ("127.0.0.1", 1), torch.device("cpu")
    )
    member.channels = [SimpleNamespace(send=unsent)]
    member._pulse = SimpleNamespace(lost=RankMemoryError(1, 40))
    return member


def begin_a_step(member):
    runner = object.__new__(MeshRunner)
    runner.member, runner._cache, runner._homes = member, None, [0]
    runner.begin(SimpleNamespace(segments=()), None, [])


def count_experts(member):
    MeshCounter(member, SimpleNamespace(read=lambda: (0, [])))


def move_experts(member):
    runner = object.__new__(MeshRunner)
    lost, member._pulse.lost = member._pulse.lost, None

    def tend():
        member._pulse.lost = lost  # just now
        unsent(None)

    runner.member, runner.rebalancing = member, SimpleNamespace(tend=tend)
    runner.tend()


@pytest.mark.parametrize("work", [begin_a_step, count_experts, move_experts])
def test_what_cannot_be_sent_says_that_a_rank_has_no_memory_for_the_step_before(work):
    """In a pipeline, the leader begins a step while a later stage computes the one before."""
    member = member_that_lacks_memory()
    with pytest.raises(RankMemoryError, match="a step of 40 tokens"):
        work(member)


def test_a_rank_that_cannot_load_is_named_by_the_leader_which_ends(tmp_path):
    with mesh_of(tmp_path, "1x2", follow_without_room, {}) as (checkpoint, mesh, others):
        with pytest.raises(
            RankFailedError, match=rf"rank 1 ended: RuntimeError: .* {TOO_MUCH} bytes"
        ) as found:
            Engine(checkpoint, **mesh)
        assert found.value.exit_code == 3  # the cause is elsewhere
        assert others.wait(KNOWN_S) == [1]


def test_a_rank_can_say_why_it_ends_where_names_in_its_checkpoint_are_no_text():
    said = []
    channel = SimpleNamespace(fail=said.append)
    member = SimpleNamespace(leads=False, channels=[channel], close=lambda: said.append("closed"))
    Member.give_up(member, WorkerError("\ud800.safetensors is missing"))
    assert said == [r"\ud800.safetensors is missing", "closed"]
    assert CODEC.encode(RankFailed(said[0]))


def test_ranks_do_not_wait_for_a_leader_that_cannot_load(tmp_path):
    with mesh_of(tmp_path, "2x1", follow, {}) as (checkpoint, mesh, others):
        with mock.patch.object(loading, "load_model", no_room), pytest.raises(RuntimeError):
            Engine(checkpoint, **mesh)
        assert others.wait(KNOWN_S) == [1]
        assert "rank 0 ended: RuntimeError: [enforce fail at alloc_cpu" in others.errors[0]


def test_the_share_of_a_rank_is_what_it_holds(tmp_path):
    stored = stored_tensors(write_checkpoint(tmp_path, num_hidden_layers=4))
    whole = Stage.whole(4)
    assert share_of(whole, stored) == 1
    first, last = replace(whole, end=2), replace(whole, begin=2)
    assert share_of(first, stored) + share_of(last, stored) == pytest.approx(1)
    half = replace(whole, experts={layer: range(4) for layer in range(4)})
    other = replace(whole, experts={layer: range(4, 8) for layer in range(4)})
    assert 0.5 < share_of(half, stored) == share_of(other, stored) < 1
