"""Experts move while a mesh serves: to where loads are even, and without changing a token."""

import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine.core import EngineCore
from moe_worker.engine.offline import Engine
from moe_worker.engine.requests import Request
from moe_worker.engine.spread import rebalances
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.messages import Prepare, Switch
from moe_worker.mesh.placement import Topology, imbalance, nearest, placement
from moe_worker.mesh.places import ExpertPlaces
from moe_worker.mesh.rebalance import plan
from moe_worker.mesh.rebalance.execute import PREPARE_S, Rebalancing
from moe_worker.mesh.rebalance.hold import HeldExperts
from moe_worker.mesh.rebalance.plan import DecayedLoads, RebalancePolicy, better_places
from moe_worker.sampling.parameters import SamplingParameters
from tests.checkpoints import write_checkpoint
from tests.worker.mesh_ranks import followers, free_address

OPTIONS = {"device": "cpu", "dtype": "float32", "threads": 1, "context_length": 256}
DEADLINE_S = 60


def test_old_loads_count_half_after_each_half_life():
    loads = DecayedLoads(half_life_s=10)
    loads.add([(1, [8, 0])], now=100)
    loads.add([(1, [8, 6])], now=110)
    assert loads.of(1) == [4, 6]
    loads.add([(1, [0, 6])], now=130)  # a counter that began anew
    assert loads.of(1) == [1, 1.5]
    assert loads.of(2) == []


EVEN, SKEWED = [100.0] * 8, [800.0, 100.0, 700.0, 100.0, 50.0, 50.0, 50.0, 50.0]
PLACES = tuple(range(8))


def better(loads, threshold=1.2):
    return better_places(loads, PLACES, Topology(2), 0, threshold)


def test_experts_move_only_where_that_helps():
    assert better(EVEN) is None
    assert better([load / 1000 for load in SKEWED]) is None  # too few choices to tell
    assert better(SKEWED, threshold=2) is None
    assert imbalance(SKEWED, PLACES, 2) > 1.7
    assert imbalance(SKEWED, better(SKEWED), 2) < 1.1
    assert better([1000.0, *[0.0] * 7]) is None  # one expert alone cannot be spread without copies


def drawn_places(data, ranks, redundant):
    loads = data.draw(st.lists(st.integers(0, 100), min_size=8, max_size=8))
    return placement([loads], Topology(ranks), redundant)[0]


@given(st.data(), st.sampled_from([1, 2, 4]), st.sampled_from([0, 4, 8]))
def test_the_nearest_placement_has_the_same_ranks_and_moves_no_more(data, ranks, redundant):
    wanted, present = (drawn_places(data, ranks, redundant) for _ in range(2))
    found = nearest(wanted, present, ranks)
    each = len(found) // ranks

    def parts(places):
        return sorted(sorted(places[rank * each : (rank + 1) * each]) for rank in range(ranks))

    assert parts(found) == parts(wanted)
    assert nearest(present, present, ranks) == present

    def stay(places):
        return sum(one == other for one, other in zip(places, present, strict=True))

    assert stay(found) >= stay(wanted)


class FakeChannel:
    def __init__(self, rank):
        self.rank, self.told, self.sent = rank, 0, []

    def send(self, message):
        self.sent.append(message)


class FakeHeld:
    def __init__(self):
        self.progress, self.taken = 0, []

    def take(self, message):
        self.taken.append(message)


def places_of(ranks=2, redundant=0, experts=8, layers=3):
    routing = SimpleNamespace(groups=1)
    config = SimpleNamespace(
        moe=SimpleNamespace(routed=experts, routing=routing), moe_layers=tuple(range(1, layers))
    )
    return ExpertPlaces(config, ranks, redundant)


@pytest.fixture
def leader():
    """Of a mesh 2x2 whose second stage has the layers 1 and 2; loads of layer 1 are uneven."""
    now, counts = [0.0], {1: [0] * 8, 2: [0] * 8}
    member = SimpleNamespace(
        shape=MeshShape(2, 2), rank=0, absent=(), channels=[FakeChannel(rank) for rank in (1, 2, 3)]
    )
    counter = SimpleNamespace(read=lambda: (1, [(layer, own, 0) for layer, own in counts.items()]))
    policy, held = RebalancePolicy(interval_s=100.0), FakeHeld()
    made = Rebalancing(
        policy, places_of(), held, member, [range(1), range(1, 3)], counter, clock=lambda: now[0]
    )

    def after(seconds):
        now[0] += seconds
        for _ in range(4):
            made.tend()

    def use(skewed):
        counts[1] = [old + int(load) for old, load in zip(counts[1], skewed, strict=True)]
        counts[2] = [old + 100 for old in counts[2]]

    return SimpleNamespace(made=made, channels=member.channels, held=held, after=after, use=use)


def test_a_move_is_prepared_by_all_ranks_of_its_stage_before_any_switches(leader):
    leader.use(SKEWED)
    leader.after(50)
    assert [channel.sent for channel in leader.channels] == [[], [], []]
    leader.after(50)
    (first,) = leader.channels[1].sent
    assert (first.number, first.layer) == (1, 1)
    assert [channel.sent for channel in leader.channels] == [[], [first], [first]]
    assert leader.held.taken == []  # the leader is of the other stage
    leader.channels[1].told = 1
    leader.after(1)
    assert leader.channels[2].sent == [first]
    assert leader.made.places.moved == {}
    leader.channels[2].told = 1
    leader.after(1)
    assert [channel.sent for channel in leader.channels[1:]] == [[first, Switch(1)]] * 2
    assert leader.made.places.moved == {1: first.places}
    assert leader.made.count == 1
    assert max(leader.made.rank_loads(1)) / sum(leader.made.rank_loads(1)) < 0.55
    leader.after(99)
    assert leader.channels[2].sent == [first, Switch(1)]


@pytest.mark.parametrize("why", ["cannot read", "is too slow"])
def test_experts_stay_where_a_rank_does_not_prepare_them(leader, why):
    leader.use(SKEWED)
    leader.after(100)
    leader.channels[1].told = 1
    leader.channels[2].told = -1 if why == "cannot read" else 0
    leader.after(1 if why == "cannot read" else PREPARE_S)
    assert leader.channels[1].sent[1:] == [Switch(1, go=False)]
    assert (leader.made.places.moved, leader.made.count, leader.made.moving) == ({}, 0, False)


def held_by(read):
    """Of rank 1 of a mesh 1x2."""
    beats, member = [], SimpleNamespace(rank=1, column=1, number=0, leads=False)
    channel = SimpleNamespace(progress=0, beat=lambda: beats.append(channel.progress))
    member.channels, member.columns = [channel], lambda _: [0, 1]
    part = SimpleNamespace(taken=[], place=lambda *_: None)
    part.hold = lambda layer, experts, _: part.taken.append((layer, experts))
    return HeldExperts(places_of(), member, part, read), part, beats


def wait_for(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_rank_reads_in_the_background_and_takes_what_it_has_read():
    held, part, beats = held_by(lambda layer, before, own, _: (layer, before, own))
    held.take(Prepare(7, 1, (0, 1, 2, 4, 3, 5, 6, 7)))
    wait_for(lambda: 7 in beats)
    assert part.taken == []
    held.take(Switch(7))
    assert part.taken == [(1, (1, (1, 3, 5, 7), (3, 5, 6, 7)))]
    assert held.places.held(1, 1) == (3, 5, 6, 7)
    with pytest.raises(MeshError, match="rank 1 has not prepared move 8"):
        held.take(Switch(8))


def threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_reading_uses_one_thread_and_later_threads_compute_as_before():
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        held, part, beats = held_by(lambda *_: torch.get_num_threads())
        held.take(Prepare(7, 1, (0, 1, 2, 4, 3, 5, 6, 7)))
        wait_for(lambda: 7 in beats)
        held.take(Switch(7))
        assert part.taken == [(1, 1)]
        assert torch.get_num_threads() == 3
        wait_for(lambda: threads_of_a_new_thread() == 3)
    finally:
        torch.set_num_threads(usual)


def test_reading_gives_way_to_passes_sooner_than_threads_usually_do():
    usual, seen = sys.getswitchinterval(), []
    held, _, beats = held_by(lambda *_: seen.append(sys.getswitchinterval()) or "read")
    held.take(Prepare(7, 1, (0, 1, 2, 4, 3, 5, 6, 7)))
    wait_for(lambda: 7 in beats)
    assert seen[0] < usual / 10
    wait_for(lambda: sys.getswitchinterval() == usual)


def test_a_rank_that_cannot_read_says_so_and_serves_on():
    def read(*_):
        raise OSError("the disk is gone")

    held, part, beats = held_by(read)
    held.take(Prepare(7, 1, (0, 1, 2, 4, 3, 5, 6, 7)))
    wait_for(lambda: -7 in beats)
    held.take(Switch(7, go=False))
    assert part.taken == []


def test_a_rank_holds_what_its_new_leader_says():
    held, part, _ = held_by(lambda layer, before, own, _: (layer, before, own))
    moved = (0, 1, 2, 4, 3, 5, 6, 7)
    held.adopt({2: moved}, range(3))
    assert part.taken == [(2, (2, (1, 3, 5, 7), (3, 5, 6, 7)))]
    held.adopt({}, range(3))
    assert part.taken[1:] == [(2, (2, (3, 5, 6, 7), (1, 3, 5, 7)))]
    for wrong in ({0: moved}, {1: moved[1:]}, {1: (0,) * 8}):
        with pytest.raises(MeshError, match="start all ranks again"):
            held.adopt(wrong, range(3))


def generate(core, prompts, tokens, at=lambda _: None):
    """Tokens of greedy and seeded requests. at: called before each step, with its number."""
    for number, prompt in enumerate(prompts):
        sampling = SamplingParameters(
            max_tokens=tokens, temperature=0.6 * number, seed=number, ignore_eos=True
        )
        core.submit(Request(number, tuple(prompt), sampling, seed=number))
    found, step = [[] for _ in prompts], 0
    while not core.idle:
        at(step)
        for delta in core.step():
            found[delta.id].append(delta.token)
        step += 1
    return found


@pytest.mark.timeout(200)
def test_experts_move_under_load_and_a_new_process_holds_what_has_moved(tmp_path, patient, monkeypatch):
    """Tokens are those of one process, through moves of experts and the loss of a rank behind them."""
    monkeypatch.setattr(plan, "FEWEST_CHOICES", 1)
    checkpoint = write_checkpoint(tmp_path, eos_token_id=None)
    mesh = {"mesh": "1x2", "mesh_leader": free_address(), "redundant_experts": 2, **OPTIONS}
    mesh |= {"rebalance_interval": 0.05, "rebalance_threshold": 1.0}
    prompts = [[7 + i % 290 for i in range(40)], [5], [300 - i % 250 for i in range(30)]]
    alone = EngineCore(Engine(checkpoint, **OPTIONS)._loaded, EngineOptions(**OPTIONS))
    expected = generate(alone, prompts, 80)
    with contextlib.ExitStack() as stack:
        running = [followers(checkpoint, 2, **mesh)]
        stack.callback(lambda: [each.kill() for each in running])
        engine = Engine(checkpoint, **mesh)
        stack.callback(engine._loaded.member.close)
        core = EngineCore(engine._loaded, EngineOptions(**mesh))
        lost = []

        def lose_one_after_a_move(_):
            if core.mesh_report.rebalances and not lost:
                lost.append(dict(engine._loaded.runner.rebalancing.places.moved))
                running[0].kill()
                running.append(followers(checkpoint, 2, **mesh))

        assert generate(core, prompts, 80, lose_one_after_a_move) == expected
        assert lost
        assert lost[0]
        report = core.mesh_report
        assert (report.epoch, report.ready_ranks) == (1, (0, 1))
        for layer in core.expert_statistics.layers:
            assert len(layer.rank_tokens) == 2


@pytest.mark.parametrize(
    ("mode", "device", "moves"),
    [("auto", "cpu", True), ("auto", "cuda:0", False), ("on", "cpu", True), ("on", "cuda:0", True),
     ("off", "cpu", False), ("off", "cuda:0", False)],
)  # fmt: skip
def test_experts_move_on_gpus_only_where_that_is_asked_for(mode, device, moves):
    assert rebalances(mode, torch.device(device)) is moves
