"""Which part of the model each rank holds: the layers of its stage, and some experts of each."""

import re
from collections.abc import Mapping

import torch

from moe_worker.config.mesh import MeshShape
from moe_worker.config.model import ModelConfig
from moe_worker.mesh.dispatch import AllToAllDispatch, PlaceTable
from moe_worker.mesh.layers import layer_ranges
from moe_worker.mesh.member import Member
from moe_worker.mesh.places import ExpertPlaces
from moe_worker.models.safetensors import StoredTensor
from moe_worker.models.stage import Stage

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*\.experts\.(\d+)\.)?")


def part_of(
    config: ModelConfig,
    member: Member,
    stored: Mapping[str, StoredTensor],
    places: ExpertPlaces,
    device: torch.device,
) -> Stage:
    """What this rank holds. Raises SettingsError where the model cannot be spread over the mesh."""
    layers = stage_ranges(config, member.shape, stored)[member.number]
    return stage_of(config, member, layers, places, device)


def stage_of(
    config: ModelConfig, member: Member, layers: range, places: ExpertPlaces, device: torch.device
) -> Stage:
    """This rank's part of `layers`."""
    routed = config.moe.routed
    own = [layer for layer in places.layers if layer in layers]
    held = {layer: places.held(layer, member.column) for layer in own}
    dispatches = {
        layer: AllToAllDispatch(place_table(places, member, layer, device), routed, member.group)
        for layer in own
    }
    return Stage(layers.start, layers.stop, config.num_hidden_layers, held, dispatches)


def place_table(places: ExpertPlaces, member: Member, layer: int, device: torch.device) -> PlaceTable:
    """Where experts of a layer are among the ranks of this process's stage that take part."""
    present = member.columns(member.number)
    return PlaceTable(places.among(layer, present), places.experts, len(present), device)


def stage_ranges(config: ModelConfig, shape: MeshShape, stored: Mapping[str, StoredTensor]) -> list[range]:
    """Layers of each stage. Raises SettingsError where there are fewer layers than stages."""
    sizes, ends = _nbytes(config, stored, shape.expert)
    return layer_ranges(sizes, shape.pipeline, *ends)


def share_of(stage: Stage, stored: Mapping[str, StoredTensor]) -> float:
    """The share of a checkpoint's bytes that a rank with `stage` holds."""
    own = sum(tensor.nbytes for tensor in stored.values() if _holds(stage, tensor.name))
    return own / sum(tensor.nbytes for tensor in stored.values())


def _holds(stage: Stage, name: str) -> bool:
    match = _LAYER.match(name)
    if match is None:
        return stage.first if "embed_tokens" in name else stage.last
    layer, expert = int(match[1]), match[3]
    if layer not in stage.layers:
        return False
    return expert is None or layer not in stage.experts or int(expert) in stage.experts[layer]


def _nbytes(
    config: ModelConfig, stored: Mapping[str, StoredTensor], ranks: int
) -> tuple[list[int], tuple[int, int]]:
    """Bytes that a rank holds of each layer, and of the embedding and the head."""
    layers, ends = [0] * config.num_hidden_layers, [0, 0]
    for tensor in stored.values():
        match = _LAYER.match(tensor.name)
        if match is None:
            if "embed_tokens" in tensor.name:
                ends[0] += tensor.nbytes
            if tensor.name.startswith("lm_head") or (
                config.tie_word_embeddings and "embed_tokens" in tensor.name
            ):
                ends[1] += tensor.nbytes
        elif int(match[1]) < len(layers):
            layers[int(match[1])] += tensor.nbytes // (ranks if match[2] else 1)
    return layers, (ends[0], ends[1])
