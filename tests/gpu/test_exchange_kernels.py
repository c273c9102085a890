"""Exchanges of fixed size: what every rank takes out is what the others put in, whatever the routing."""

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from moe_worker.kernels.triton import exchange
from moe_worker.kernels.triton.exchange import Places, pack, sum_rows, unpack
from moe_worker.kernels.triton.norm import Activation, Added, Rounding
from moe_worker.mesh import fixed
from moe_worker.mesh.dispatch import AllToAllDispatch, PlaceTable
from moe_worker.mesh.fixed import Exchanges, FixedExchange
from moe_worker.mesh.placement import Topology, placement
from tests.gpu.device import DEVICE, INTERPRETED, needs_device

pytestmark = needs_device
WIDTH = 128
# What reads the values that are sent.
SENT = [Rounding.NONE, Rounding.INT8, Rounding.E4M3]


def of_rank(places, rank, ranks, routed):
    at = [[place for place, own in enumerate(places) if own == expert] for expert in range(routed)]
    most = max(map(len, at))
    table = torch.tensor([each + [-1] * (most - len(each)) for each in at], dtype=torch.int32)
    copies = torch.tensor([len(each) for each in at], dtype=torch.int32)
    return Places(table.to(DEVICE), copies.to(DEVICE), len(places) // ranks, rank, ranks)


class Rank:
    """One rank's tokens: random routes, some of them to no expert, shared experts behind the chosen."""

    def __init__(self, draw, tokens, routed, shared, per_token, rounding=Rounding.INT8):
        generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        experts = torch.rand(tokens, routed, generator=generator).topk(per_token).indices
        if draw.random() < 0.3:
            experts = experts % max(1, routed // 2)  # some ranks get little; copies of an expert do no harm
        dropped = torch.rand(experts.shape, generator=generator) < draw.choice([0, 0.3, 1])
        behind = torch.arange(routed, routed + shared).expand(tokens, -1)
        self.experts = torch.cat((experts.masked_fill(dropped, -1), behind), 1).int().to(DEVICE)
        self.weights = torch.rand(self.experts.shape, generator=generator).to(DEVICE)
        self.x = Activation.empty_for(rounding, tokens, WIDTH, DEVICE)
        self.x.x_TD.copy_(torch.randn(tokens, WIDTH, generator=generator))
        self.x.q_TD.copy_(
            torch.randint(-127, 128, (tokens, WIDTH), generator=generator).to(self.x.q_TD.dtype)
        )
        self.x.scales_TX.copy_(torch.rand(self.x.scales_TX.shape, generator=generator))


@pytest.mark.parametrize("rounding", SENT, ids=["bf16", "int8", "e4m3"])
@pytest.mark.parametrize("seed", range(3 if INTERPRETED else 40))
def test_every_token_reaches_its_experts_and_comes_back(seed, rounding, monkeypatch):
    monkeypatch.setattr(exchange, "chunk_of", lambda _: 2 if seed % 2 else 8)
    draw, rounded = random.Random(seed), rounding is not Rounding.NONE
    ranks, shared = draw.randint(2, 3), draw.randint(0, 2)
    routed = ranks * draw.randint(1, 3)
    (places,) = placement(
        [[draw.random() for _ in range(routed)]], Topology(ranks), ranks * draw.randint(0, 2)
    )
    per_token, each = draw.randint(1, routed), len(places) // ranks
    own = [Rank(draw, draw.choice([1, 2, 5]), routed, shared, per_token, rounding) for _ in range(ranks)]
    capacity, columns = max(rank.experts.shape[0] for rank in own), per_token + shared
    counts = [torch.full((each + shared,), 7, dtype=torch.int32, device=DEVICE) for _ in own]
    most = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    sent = [
        pack(
            rank.x,
            rounded,
            rank.experts,
            rank.weights,
            of_rank(places, n, ranks, routed),
            capacity,
            counts[n],
            most,
        )
        for n, rank in enumerate(own)
    ]
    words = WIDTH // 4 + own[0].x.scales_TX.shape[1] if rounded else WIDTH // 2
    assert sent[0][0].shape[1] == words + 2 * columns  # numbers of experts, and their weights
    assert int(most) <= capacity
    away = (ranks - 1) * capacity
    sizes = [(away + rank.experts.shape[0], WIDTH) for rank in own]
    back = [torch.full(size, float("nan"), dtype=torch.bfloat16, device=DEVICE) for size in sizes]
    sums = []
    for n, rank in enumerate(own):
        received = torch.cat([sent[o][0][at(n, o) * capacity :][:capacity] for o in range(ranks) if o != n])
        x, experts, weights = unpack(received, sent[n][0], away, rank.x, rounded, columns, counts[n])
        found = torch.bincount(experts[experts >= 0].long(), minlength=each + shared)
        assert counts[n].tolist() == found.tolist()
        # Each expert gives its number times the token's weight in the first value, and a sum of what it read.
        names = torch.tensor(
            [*places[n * each : (n + 1) * each], *range(routed, routed + shared)], device=DEVICE
        )
        values = values_of(x, rounded)
        rows = torch.full((*experts.shape, WIDTH), float("nan"), device=DEVICE)
        there = experts >= 0
        scaled = values.unsqueeze(1) * (names[experts.long().clamp(min=0)] + 1.0).unsqueeze(-1)
        rows[there] = (scaled * weights.unsqueeze(-1))[there]
        out = torch.empty(away, WIDTH, dtype=torch.bfloat16, device=DEVICE)
        sum_rows(Added(rows.flatten(0, 1).bfloat16(), experts_M=experts), away, out, back[n])
        sums.append(out)
    for n, rank in enumerate(own):
        for o in (o for o in range(ranks) if o != n):
            back[n][at(o, n) * capacity :][:capacity] = sums[o][at(n, o) * capacity :][:capacity]
        slots = sent[n][1]
        parts = back[n][slots.row_TE.clamp(max=back[n].shape[0] - 1)].float()
        total = torch.where(slots.chosen_TE.unsqueeze(-1) >= 0, parts, 0.0).sum(1)
        values = values_of(rank.x, rounded)
        share = torch.where(rank.experts >= 0, (rank.experts + 1) * rank.weights, 0.0).sum(1, keepdim=True)
        assert torch.allclose(total, values * share, rtol=0.03, atol=0.3 if rounded else 0.1)


def values_of(x, rounded):
    return x.q_TD.float() * x.scales_TX.repeat_interleave(x.piece, 1) if rounded else x.x_TD.float()


def at(rank, other):
    """The block of `rank` in what `other` sends or gets."""
    return rank if rank < other else rank - 1


@pytest.mark.parametrize("rounding", SENT, ids=["bf16", "int8", "e4m3"])
def test_a_rank_that_is_alone_keeps_its_tokens(rounding):
    """As one that waits to meet the others, or serves without them."""
    rank, rounded = Rank(random.Random(2), 5, 4, 1, 2, rounding), rounding is not Rounding.NONE
    most = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    places = [3, 1, 0, 2]
    exchange = FixedExchange(PlaceTable(places, 4, 1, DEVICE), 5, None, most)
    work = exchange.scatter(rank.x, rounded, rank.experts, rank.weights, 0)
    numbers = torch.tensor([*[places.index(expert) for expert in range(4)], 4, -1], device=DEVICE)
    assert work.experts_RK.tolist() == numbers[rank.experts.long()].tolist()
    there = rank.experts >= 0
    assert torch.equal(work.weights_RK[there], rank.weights[there])
    read, given = (work.x.q_TD, rank.x.q_TD) if rounded else (work.x.x_TD, rank.x.x_TD)
    assert torch.equal(read.float(), given.float())
    rows = torch.randn(*rank.experts.shape, WIDTH, device=DEVICE).bfloat16()
    back = exchange.gather(Added(rows.flatten(0, 1), experts_M=work.experts_RK))
    expected = torch.where(there.unsqueeze(-1), rows.float(), 0.0).sum(1)
    assert torch.allclose(back.rows_MD[back.order_M].float(), expected, atol=0.05)
    assert not Exchanges(None, DEVICE).overflowed(0)


def test_muted_exchanges_need_no_other_rank(monkeypatch):
    """Other ranks have no tokens then, and the experts of this one take its own."""
    rank, group = Rank(random.Random(2), 5, 4, 1, 2), SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    exchanges = Exchanges(group, DEVICE)
    exchange = exchanges.of(AllToAllDispatch(PlaceTable([3, 1, 0, 2], 4, 2, DEVICE), 4, group), 3)
    calls = []
    monkeypatch.setattr(fixed, "all_to_all", lambda into, *_: calls.append(into.fill_(-1)))
    with exchanges.muted():
        work = exchange.scatter(rank.x, True, rank.experts, rank.weights, 5)
        rows = torch.ones(*work.experts_RK.shape, WIDTH, device=DEVICE).bfloat16()
        back = exchange.gather(Added(rows.flatten(0, 1), experts_M=work.experts_RK))
    assert work.experts_RK[:5].tolist() == [[-1] * 3] * 5
    own = ((rank.experts == 3) | (rank.experts == 1) | (rank.experts == 4)).sum(1)
    assert torch.equal((work.experts_RK[5:] >= 0).sum(1), own[own > 0])
    assert back.rows_MD[:5].abs().sum() == 0
    assert not calls
    exchange.scatter(rank.x, True, rank.experts, rank.weights, 5)
    assert calls


def test_tokens_without_room_are_told():
    draw = random.Random(1)
    rank = Rank(draw, 5, 4, 0, 4)
    rank.experts.copy_(torch.tensor([2, 3, -1, -1]).expand(5, -1))
    places = of_rank((0, 1, 2, 3), 0, 2, 4)
    most, counts = (
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )
    _, slots = pack(rank.x, False, rank.experts, rank.weights, places, 2, counts, most)
    assert int(most) == 5
    assert slots.chosen_TE.tolist() == [[-1, 0]] * 2 + [[-1, -1]] * 3
    assert slots.source_S.tolist() == [0, 1] + [-1] * 5
