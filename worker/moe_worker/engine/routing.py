"""What options change in a checkpoint's routers: the mass, and the load-balance coefficient.

Both are fixed when the model is loaded, from files of the checkpoint and options of the revision: answers do
not depend on what a worker served before.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe_worker.config.engine import EngineOptions
from moe_worker.config.model import ModelConfig
from moe_worker.config.routing_report import (
    ROUTING_FILE,
    KnownDomains,
    RoutingReport,
    check_mass,
    read_routing_report,
)
from moe_worker.errors import SettingsError
from moe_worker.models.deepseek import DeepseekModel, MoeBlock
from moe_worker.models.runner import Runner, TellsChoices
from moe_worker.moe.balance import nudge
from moe_worker.moe.learning import RoutingLearner

_TELL_NOTHING = (
    "learn_routing: the experts of each request are known only in one process on a CPU; set --device cpu, "
    "without --mesh, or leave --learn-routing out"
)


def with_mass(config: ModelConfig, directory: Path, options: EngineOptions) -> ModelConfig:
    """The configuration with the mass that the user chose. Raises SettingsError if it is not allowed."""
    if options.routing_mass is None:
        return config
    check_mass(options.routing_mass, config.moe.routing, read_routing_report(directory))
    routing = replace(config.moe.routing, mass=options.routing_mass)
    return replace(config, moe=replace(config.moe, routing=routing))


def nudges_of(config: ModelConfig, directory: Path, options: EngineOptions) -> dict[int, Tensor]:
    """By layer, what lets experts with little load take the place of others whose scores differ by less than
    the margin; nothing is loaded yet.

    The checkpoint's report has their loads, or already what evens them out within another margin, which is
    scaled then. Raises SettingsError where it has neither, or routers no bias.
    """
    if not options.routing_margin:
        return {}
    if not config.moe.has_bias:
        raise SettingsError(
            f"routing_margin is {options.routing_margin:g}, but the routers of {config.architecture} have no "
            "bias to carry it; set the margin to 0"
        )
    report, nudges = read_routing_report(directory), {}
    for index in config.moe_layers:
        nudge_E = _nudge(report, index, options.routing_margin)
        if nudge_E is None or len(nudge_E) != config.moe.routed:
            raise SettingsError(
                f"routing_margin is {options.routing_margin:g}, but the checkpoint has no {ROUTING_FILE} "
                f"with the loads of layer {index}; `moe-worker routing` writes it, or set the margin to 0"
            )
        nudges[index] = nudge_E
    return nudges


@torch.inference_mode()
def balance(model: DeepseekModel, nudges: Mapping[int, Tensor]) -> None:
    """Adds them to the biases of the routers."""
    for index, layer in zip(model.stage.layers, model.layers, strict=True):
        bias_E = layer.block.router.bias_E if isinstance(layer.block, MoeBlock) else None
        if bias_E is not None and index in nudges:
            bias_E += nudges[index].to(bias_E)


def _nudge(report: RoutingReport | None, index: int, margin: float) -> Tensor | None:
    if report is None:
        return None
    if report.balance is not None and (ready := report.balance.nudges.get(index)) is not None:
        return torch.tensor(ready) * (margin / report.balance.margin)
    load = report.loads.get(index)
    return None if load is None else nudge(torch.tensor(load), 1.0, margin)


def domains_to_learn(
    config: ModelConfig, directory: Path, options: EngineOptions, device: torch.device
) -> KnownDomains | None:
    """What requests move where the user wants that; nothing is loaded yet.

    Raises SettingsError where this worker cannot learn, or has nothing to begin with.
    """
    if not options.learn_routing:
        return None
    if device.type != "cpu" or options.mesh_shape.ranks > 1:
        raise SettingsError(_TELL_NOTHING)
    report = read_routing_report(directory)
    known = None if report is None else report.domains
    layers = config.moe_layers
    if known is None or tuple(known.shares) != layers or len(known.shares[layers[0]][0]) != config.moe.routed:
        raise SettingsError(
            f"learn_routing: the checkpoint has no {ROUTING_FILE} with the domains of its layers; "
            "`moe-worker routing --domains` writes it"
        )
    return known


def learner_of(runner: Runner, config: ModelConfig, known: KnownDomains | None) -> RoutingLearner | None:
    """Learns from the requests of `runner`, beginning with `known`. Raises SettingsError where it cannot."""
    if known is None:
        return None
    if not isinstance(runner, TellsChoices):
        raise SettingsError(_TELL_NOTHING)
    runner.keep_choices()
    return RoutingLearner(known, config.moe.routed)
