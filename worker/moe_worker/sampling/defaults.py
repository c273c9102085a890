"""Sampling defaults of a checkpoint (generation_config.json), if the user enables them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_worker.config.directory import GENERATION, read_json
from moe_worker.config.fields import Fields
from moe_worker.errors import ConfigError
from moe_worker.reading import present
from moe_worker.sampling.parameters import SamplingParameters

NEUTRAL = SamplingParameters()
# Fields of generation_config.json by their names in a request, as vLLM takes them.
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_WHOLE = {"top_k": "top_k", "max_new_tokens": "max_tokens"}


def sampling_defaults(directory: Path, mode: str) -> SamplingParameters:
    """Sampling parameters of a request that sets none.

    With `mode` "none", the worker's own defaults. With "auto", those of generation_config.json, read as in
    vLLM: temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens (max_tokens). `do_sample:
    false` is greedy, as in transformers, and `true` without a temperature means 1. Raises CheckpointError.
    """
    path = directory / GENERATION
    if mode == "none" or not present(path):
        return NEUTRAL
    found = SamplingParameters(**_defaults(Fields(str(path), read_json(path))))
    wrong = "; ".join(f"{violation.field} {violation.description}" for violation in found.violations())
    if wrong:
        raise ConfigError(f"{path}: {wrong}; correct the file, or serve with --generation-config none")
    return found


def _defaults(fields: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {name: fields.number(name) for name in _given(fields, _NUMBERS)}
    found |= {_WHOLE[name]: fields.integer(name, least=-1) for name in _given(fields, _WHOLE)}
    if found.get("top_k") == -1:  # in vLLM -1 keeps all tokens; here it is 0
        found["top_k"] = 0
    if fields.values.get("do_sample") is not None:
        sampled = fields.boolean("do_sample")
        found["temperature"] = found.get("temperature", 1.0) if sampled else 0.0
    return found


def _given(fields: Fields, names: Iterable[str]) -> list[str]:
    return [name for name in names if fields.values.get(name) is not None]
