"""Weight storage according to config.json: plain, in FP8 blocks, or packed in four bits."""

from dataclasses import dataclass

from moe_worker.config.fields import Fields
from moe_worker.errors import ConfigError


@dataclass(frozen=True)
class Fp8Storage:
    """FP8 (e4m3) with one scale for each block of `block` rows and columns, as DeepSeek publishes."""

    block: tuple[int, int]


@dataclass(frozen=True)
class PackedStorage:
    """compressed-tensors pack-quantized int4: one scale for `group` inputs (None: for the whole row)."""

    group: int | None
    symmetric: bool


@dataclass(frozen=True)
class SparseStorage:
    """The layout s14 (docs/formats.md): int4 values of 1 in 4 inputs, one scale for `group` inputs.

    The file may also contain matrices that are not sparse, in the pack-quantized layout or plain.
    """

    group: int


Storage = Fp8Storage | PackedStorage | SparseStorage


def parse_storage(fields: Fields) -> Storage | None:
    """None if weights are stored as plain floating-point numbers. Raises ConfigError."""
    value = fields.values.get("quantization_config")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise fields.fail("quantization_config", "an object")
    nested = Fields(f"{fields.source}: quantization_config", value)
    method = nested.choice("quant_method", ("fp8", "compressed-tensors", "moe-operator"))
    if method == "fp8":
        return _parse_fp8(nested)
    return _parse_packed(nested) if method == "compressed-tensors" else _parse_sparse(nested)


def _parse_sparse(fields: Fields) -> SparseStorage:
    fields.choice("format", ("s14-int4",))
    if fields.integer("version", default=1) != 1:
        raise fields.fail("version", "1: this checkpoint was written by a newer release")
    group = fields.integer("group_size", least=4)
    if group % 4:
        raise fields.fail("group_size", "a multiple of 4")
    return SparseStorage(group)


def _parse_fp8(fields: Fields) -> Fp8Storage:
    fields.choice("fmt", ("e4m3",), default="e4m3")
    block = fields.integers("weight_block_size", least=1)
    if len(block) != 2:
        raise fields.fail("weight_block_size", "two integers, as [128, 128]")
    return Fp8Storage((block[0], block[1]))


def _parse_packed(fields: Fields) -> PackedStorage:
    fields.choice("format", ("pack-quantized",))
    groups = fields.values.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise fields.fail(
            "config_groups", "an object with one group: all layers must have the same quantization"
        )
    [(name, group)] = groups.items()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ConfigError(f"{fields.source}: config_groups.{name} has no weights; it must describe them")
    return _parse_weights(Fields(f"{fields.source}: config_groups.{name}.weights", weights))


def _parse_weights(fields: Fields) -> PackedStorage:
    if fields.integer("num_bits") != 4:
        raise fields.fail("num_bits", "4")
    fields.choice("type", ("int",), default="int")
    strategy = fields.choice("strategy", ("group", "channel"))
    if fields.values.get("actorder") not in (None, False, "weight", "static"):
        raise fields.fail("actorder", "null or weight: the order of inputs is not changed here")
    group = fields.integer("group_size") if strategy == "group" else None
    return PackedStorage(group, fields.boolean("symmetric", default=True))
