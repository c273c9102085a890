"""spec.quality: the worker is told, and a condition says what it found."""

from moe_operator.render.worker import command
from moe_operator.resources.status import QUALITY_GATE, READY
from tests.operator.worlds import World, deployment

WORSE = "quality gate: the checkpoint needs 1.0200 bits per byte, its original 1.0000; that is 0.0200 more"


def gated(**quality):
    return deployment(quality={"maxLoss": "10m", **quality})


def test_the_worker_is_told_the_bound_and_the_text():
    words = " ".join(command(gated(text="valid")))
    assert "--max-bits-per-byte-increase 0.01 --quality-text valid" in words
    assert "quality" not in " ".join(command(deployment()))


def test_a_worse_checkpoint_stays_unready_and_the_condition_has_both_numbers():
    world = World(gated())
    world.step()
    world.fail(0, 2, f"error: {WORSE}")
    world.step()
    gate, ready = world.status.condition(QUALITY_GATE), world.status.condition(READY)
    assert (gate.status, gate.reason) == ("False", "QualityTooLow")
    assert "1.0200 bits per byte, its original 1.0000" in gate.message
    assert (ready.status, ready.reason) == ("False", "QualityTooLow")


def test_a_checkpoint_that_is_loaded_has_passed():
    world = World(gated())
    world.step()
    assert world.status.condition(QUALITY_GATE).reason == "NotChecked"
    world.all_ready()
    world.step()
    assert world.status.condition(QUALITY_GATE).status == "True"


def test_without_the_block_there_is_no_such_condition():
    world = World(deployment())
    world.step()
    assert world.status.condition(QUALITY_GATE) is None
