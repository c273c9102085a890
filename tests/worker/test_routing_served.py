"""What may be changed in a checkpoint's routers when it is served, and what its routing.json allows."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moe_worker.config.engine import EngineOptions
from moe_worker.config.moe import Level, Routing
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.offline import Engine
from moe_worker.engine.requests import Request
from moe_worker.engine.routing import domains_to_learn
from moe_worker.errors import CheckpointError, SettingsError
from moe_worker.kernels.cpu.build import BuildError
from moe_worker.kernels.cpu.library import supported_variants
from moe_worker.moe.balance import coefficient, nudge, utilisation
from moe_worker.moe.router import choose
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service.load_messages import expert_message
from moe_worker.train.routing_cli import routing as routing_command
from moe_worker.train.routing_report import Measured, measure, report
from tests.checkpoints import write_checkpoint

IDS = [5 + 7 * i % 300 for i in range(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("routed"), num_experts_per_tok=4, n_group=1, topk_group=1, num_hidden_layers=2
    )


@pytest.fixture
def reported(checkpoint):
    """Writes a routing.json for the time of a test."""
    path = checkpoint / "routing.json"

    def write(**values):
        path.write_text(json.dumps(values))

    yield write
    path.unlink(missing_ok=True)


def activated(engine):
    counter = engine.expert_counter()
    logits = engine.logits(IDS)
    counter.count(len(IDS))
    return sum(map(sum, (row for _, row, _ in counter.read()[1]))) / len(IDS), logits


def test_less_mass_is_refused_without_a_report(checkpoint):
    with pytest.raises(SettingsError) as error:
        Engine(checkpoint, routing_mass=0.5)
    said = "routing_mass is 0.5; it must be from 1 to 1: the checkpoint has no routing.json that allows less"
    assert said in str(error.value)


def test_less_mass_takes_fewer_experts_as_far_as_the_report_allows(checkpoint, reported):
    reported(least_mass=0.5)
    with pytest.raises(SettingsError, match=r"it must be from 0.5 to 1: its routing.json allows no less"):
        Engine(checkpoint, routing_mass=0.4)
    (all_, usual), (same, again), (few, _) = (
        activated(Engine(checkpoint, **options))
        for options in ({}, {"routing_mass": 1.0}, {"routing_mass": 0.5})
    )
    assert all_ == same == 4
    assert torch.equal(usual, again)
    assert 1 <= few < 4


def test_the_margin_needs_loads(checkpoint, reported):
    with pytest.raises(SettingsError, match=r"no routing.json with the loads of layer 1"):
        Engine(checkpoint, routing_margin=0.1)
    reported(least_mass=1.0, loads={"1": [0.5, 0.5]})
    with pytest.raises(SettingsError, match=r"no routing.json with the loads of layer 1"):
        Engine(checkpoint, routing_margin=0.1)


def test_a_margin_moves_tokens_to_idle_experts_and_answers_stay_the_same(checkpoint, reported):
    """Within a revision: the loads are a file's, whatever the worker served before."""
    engine = Engine(checkpoint)
    counter = engine.expert_counter()
    engine.logits(IDS)
    counter.count(len(IDS))
    ((_, before, _),) = counter.read()[1]
    reported(least_mass=1.0, loads={"1": before})
    balanced = Engine(checkpoint, routing_margin=0.3)
    counter, first = balanced.expert_counter(), balanced.logits(IDS)
    counter.count(len(IDS))
    ((_, after, _),) = counter.read()[1]
    assert utilisation(torch.tensor(after)) > utilisation(torch.tensor(before))
    assert torch.equal(balanced.logits(IDS), first)
    assert torch.equal(Engine(checkpoint, routing_margin=0.3).logits(IDS), first)


@pytest.mark.usefixtures("reported")  # removes the file
def test_a_margin_spent_in_rounds_evens_out_more_than_at_once(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{number * number % 997} and {number}" for number in range(120)))
    words = [str(checkpoint), "--data", str(text), "--mass", "1", "--context", "64"]

    def used():
        return measure(checkpoint, text, 1.0, 64, routing_margin=1.0).utilisation

    CliRunner().invoke(routing_command, words, catch_exceptions=False)
    at_once = used()
    result = CliRunner().invoke(routing_command, [*words, "--margin", "1"], catch_exceptions=False)
    found = json.loads((checkpoint / "routing.json").read_text())
    assert max(found["balance"]["nudges"]["1"]) <= found["balance"]["margin"] == 1
    assert used() > at_once
    assert f"utilisation {used():.0%}" in result.output


def test_nudges_are_scaled_to_the_margin(checkpoint, reported):
    found = []
    for scale in (1, 2, 4):
        nudges = [0.1 * scale, *[0.0] * 7]
        reported(least_mass=1.0, balance={"margin": 0.1 * scale, "nudges": {"1": nudges}})
        found.append(Engine(checkpoint, routing_margin=0.2).logits(IDS))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], Engine(checkpoint).logits(IDS))


@pytest.mark.parametrize(
    "balance",
    [
        [],
        {"margin": 0, "nudges": {}},
        {"margin": 0.1, "nudges": {"1": [0.2]}},
        {"margin": 0.1, "nudges": {"1": [-0.1]}},
        {"margin": 0.1},
    ],
)
def test_nudges_beyond_the_margin_are_refused(checkpoint, reported, balance):
    reported(least_mass=1, balance=balance)
    with pytest.raises(CheckpointError, match=r"routing.json: balance is not"):
        Engine(checkpoint, routing_mass=1.0)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"least_mass": 2},
        {"least_mass": True},
        {"least_mass": 1, "loads": {"x": []}},
        {"least_mass": 10**400},
        {"least_mass": 1, "loads": {"1": [10**400]}},
    ],
)
def test_a_broken_report_is_named(checkpoint, reported, values):
    reported(**values)
    with pytest.raises(CheckpointError, match=r"routing.json: (least_mass|loads) is not"):
        Engine(checkpoint, routing_mass=1.0)


def test_the_command_writes_what_is_served(checkpoint, reported, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 4)
    words = [str(checkpoint), "--data", str(text), "--mass", "0.6", "--most-loss", "1", "--context", "64"]
    result = CliRunner().invoke(routing_command, words, catch_exceptions=False)
    assert "least mass: 0.6" in result.output
    found = json.loads((checkpoint / "routing.json").read_text())
    assert [row["mass"] for row in found["masses"]] == [1.0, 0.6]
    assert found["masses"][0]["activated"] == 4 > found["masses"][1]["activated"] >= 1
    assert sum(found["loads"]["1"]) == pytest.approx(1, abs=1e-4)
    reported  # noqa: B018 - removes the file
    Engine(checkpoint, routing_mass=0.6, routing_margin=0.1)


@pytest.mark.usefixtures("reported")  # removes the file
def test_a_run_keeps_what_an_earlier_one_measured_and_it_did_not(checkpoint, tmp_path):
    text, labels = tmp_path / "text.txt", tmp_path / "labels.txt"
    text.write_text("\0".join(["the quick brown fox", "naive dogs jump"] * 3))
    labels.write_text("\n".join(["fox", "dog"] * 3))

    def run(*words):
        command = [str(checkpoint), "--data", str(text), "--context", "64", *words]
        said.append(CliRunner().invoke(routing_command, command, catch_exceptions=False).stderr)
        return json.loads((checkpoint / "routing.json").read_text())

    said = []
    first = run("--mass", "0.6", "--most-loss", "1")
    run("--mass", "1", "--domains", str(labels))
    assert "learn domains: 100 % (6 of 6)" in said[-1]
    balanced = run("--mass", "1", "--margin", "0.1")
    assert balanced["masses"] == first["masses"]
    assert balanced["least_mass"] == 0.6
    assert balanced["domains"]["names"] == ["dog", "fox"]
    last = run("--mass", "0.7", "--most-loss", "1")
    assert (last["least_mass"], last["balance"]) == (0.7, balanced["balance"])
    (checkpoint / "routing.json").write_text("{}")  # invalid
    assert set(run("--mass", "1")) == {"text", "most_loss", "least_mass", "masses", "loads"}


def test_what_cannot_be_measured_is_refused_before_a_text_is_scored(checkpoint, tmp_path):
    text, labels = tmp_path / "text.txt", tmp_path / "labels.txt"
    text.write_text("the quick brown fox\0naive dogs jump")
    labels.write_text("fox")
    words = [str(checkpoint), "--data", str(text), "--domains", str(labels)]
    result = CliRunner().invoke(routing_command, words)
    assert str(result.exception).startswith(f"{labels}: has 1 labels for 2 documents; give one a line")
    assert "bits per byte" not in result.output
    result = CliRunner().invoke(routing_command, [*words[:3], "--mass", "1", "--context", "257"])
    assert str(result.exception) == "--context is 257; the model allows 256 tokens at most"
    qwen = write_checkpoint(tmp_path / "qwen", family="qwen3_moe")
    result = CliRunner().invoke(routing_command, [str(qwen), "--data", str(text), "--margin", "0.1"])
    assert "have no bias to carry it; leave it out" in str(result.exception)
    assert "bits per byte" not in result.output


def test_the_report_allows_no_mass_behind_one_that_costs_too_much():
    def measured(mass, bits):
        return Measured(mass, bits, 1.0, 1.0, {1: [3, 1]})

    found = report(
        [measured(0.5, 1.0), measured(1.0, 1.0), measured(0.8, 1.004), measured(0.7, 1.1)], "t", 0.005
    )
    assert found["least_mass"] == 0.8
    assert found["loads"] == {"1": [0.75, 0.25]}


def test_an_expert_takes_the_place_only_of_one_within_the_margin():
    generator = torch.Generator().manual_seed(0)
    scores_TE, load_E = torch.rand(200, 16, generator=generator), torch.rand(16, generator=generator)
    routing, margin = Routing(16, 0, 4, (Level(4, 4),)), 0.1
    plain, _ = choose(scores_TE, None, routing)
    moved, _ = choose(scores_TE, nudge(load_E, 1.0, margin), routing)
    for scores, before, after in zip(scores_TE, plain.tolist(), moved.tolist(), strict=True):
        out, in_ = set(before) - set(after), set(after) - set(before)
        assert max((float(scores[e]) for e in out), default=0) - min(
            (float(scores[e]) for e in in_), default=1
        ) <= margin + 1e-6  # fmt: skip
    counts = [torch.bincount(x.flatten(), minlength=16) for x in (plain, moved)]
    assert (counts[0] * load_E).sum() > (counts[1] * load_E).sum()


def test_the_coefficient_falls_with_the_load():
    found = coefficient(torch.tensor([0.0, 0.5, 1.5, 2.0]), 1.0)
    assert found[:2].tolist() == [1, 1]
    assert 1 > found[2] > found[3] > 0
    assert coefficient(torch.zeros(3), 1.0).tolist() == [1.0, 1.0, 1.0]
    assert utilisation(torch.tensor([1.0, 3.0])) == pytest.approx(2 / 3)


@pytest.fixture(params=["dense", "w4a8"])
def number_format(request):
    if request.param == "w4a8":
        try:
            supported_variants()
        except BuildError as error:
            pytest.skip(str(error))
    return request.param


def run(core, prompts, tokens=6):
    for number, prompt in enumerate(prompts):
        core.submit(
            Request(number, tuple(prompt), SamplingParameters(max_tokens=tokens, ignore_eos=True), seed=1)
        )
    texts = {}
    while not core.idle:
        for delta in core.step():
            texts.setdefault(delta.id, []).append(delta.token)
    return texts


def test_requests_teach_the_matrix_and_answers_stay_the_same(checkpoint, reported, number_format):
    """Of every backend that tells its choices: all experts of all requests arrive, in some domain."""
    halves = [[0.25] * 4 + [0.0] * 4, [0.0] * 4 + [0.25] * 4]
    reported(least_mass=1.0, domains={"names": ["a", "b"], "named": 4, "shares": {"1": halves}})
    texts = []
    for learn in (False, True):
        options = EngineOptions(
            device="cpu", format=number_format, threads=1, prefix_cache=False, learn_routing=learn
        )
        core = EngineCore(load(checkpoint, options, progress=False), options)
        texts.append(run(core, [IDS, IDS[:9]]))
    assert texts[0] == texts[1]
    found = core.expert_statistics
    assert [domain.name for domain in found.domains] == ["a", "b"]
    assert sum(domain.tokens for domain in found.domains) == len(IDS) + 9 + 2 * 5
    for domain in found.domains:
        assert sum(domain.shares[0]) == pytest.approx(1)
    assert 0 < found.fit <= 1
    message = expert_message(found)
    assert message.fit == found.fit
    assert message.tokens == len(IDS) + 9 + 2 * 5
    for layer in message.layers:
        assert sum(layer.tokens) == message.tokens * message.experts_per_token
    assert list(message.domains[0].shares[0].experts) == pytest.approx(found.domains[0].shares[0])


@pytest.mark.parametrize(
    "domains",
    [None, {"names": ["a"], "named": 4, "shares": {"2": [[0.125] * 8]}}],
)
def test_learning_needs_the_domains_of_a_report(checkpoint, reported, domains):
    reported(least_mass=1.0, domains=domains)
    with pytest.raises(SettingsError, match=r"no routing.json with the domains of its layers"):
        Engine(checkpoint, learn_routing=True)


@pytest.mark.parametrize(("device", "mesh"), [("cuda", "1x1"), ("cpu", "1x2")])
def test_learning_elsewhere_than_in_one_process_on_a_cpu_is_refused_before_weights_are_read(device, mesh):
    options = EngineOptions(learn_routing=True, mesh=mesh, mesh_leader="127.0.0.1:1")
    with pytest.raises(SettingsError, match=r"only in one process on a CPU; set --device cpu, without"):
        domains_to_learn(None, Path("/nowhere"), options, torch.device(device))


@pytest.mark.parametrize(
    "domains",
    [
        [],
        {"names": "a", "named": 1, "shares": {"1": [[1.0]]}},
        {"names": ["a"], "named": 9, "shares": {"1": [[1.0]]}},
        {"names": ["a", "b"], "named": 1, "shares": {"1": [[1.0]]}},
        {"names": ["a"], "named": 1, "shares": {"x": [[1.0]]}},
        {"names": ["\ud800"], "named": 1, "shares": {"1": [[1.0]]}},
        {"names": ["a"], "named": 1, "shares": {"1": [[float("nan")]]}},
    ],
)
def test_domains_that_do_not_fit_together_are_named(checkpoint, reported, domains):
    reported(least_mass=1.0, domains=domains)
    with pytest.raises(CheckpointError, match=r"routing.json: domains is not an object of names"):
        Engine(checkpoint, learn_routing=True)


def test_the_command_learns_the_domains_of_labelled_documents(checkpoint, reported, tmp_path):
    text, labels = tmp_path / "text.txt", tmp_path / "labels.txt"
    text.write_text("\0".join(["the quick brown fox", "naive dogs jump"] * 3))
    labels.write_text("\n".join(["fox", "dog"] * 3))
    words = [str(checkpoint), "--data", str(text), "--mass", "1", "--domains", str(labels)]
    result = CliRunner().invoke(routing_command, words, catch_exceptions=False)
    assert "domains: 2, fit" in result.output
    found = json.loads((checkpoint / "routing.json").read_text())["domains"]
    assert found["names"] == ["dog", "fox"]
    assert [sum(row) for row in found["shares"]["1"]] == pytest.approx([1, 1], abs=1e-4)
    reported  # noqa: B018 - removes the file
    Engine(checkpoint, learn_routing=True)
