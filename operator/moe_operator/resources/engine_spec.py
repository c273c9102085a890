"""User input: how a worker runs the model (spec.engine)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_operator.resources import quantity
from moe_operator.resources.base import Model, number_between, rules
from moe_operator.resources.pods import Quantity, quantity_between


class EngineRouting(Model):
    """Which experts a token uses, and how many."""

    mass: Quantity | None = Field(
        default=None,
        description="Share of the scores of a token's experts at which the rest are left out: a quantity "
        "from 1m to 1, such as 750m; 1 leaves none out. A worker refuses less than the checkpoint's "
        "routing.json allows. Default: the checkpoint's.",
        json_schema_extra=rules(
            (
                quantity_between("1m", "1"),
                "mass is a quantity from 1m to 1, e.g. 750m",
            )
        ),
    )
    margin: Quantity | None = Field(
        default=None,
        description="By how much the scores of two experts may differ so that the one with less load takes "
        "the other's place: a quantity from 0 to 1, such as 50m. Loads are those of the checkpoint's "
        "routing.json, which must have them. Default: 0, none does.",
        json_schema_extra=rules(
            (
                quantity_between("0", "1"),
                "margin is a quantity from 0 to 1, e.g. 50m",
            )
        ),
    )
    learning: Literal["Off", "Online"] = Field(
        default="Off",
        description="Online: requests update which experts each domain uses, as GetExpertLoad reports it, "
        "starting from the checkpoint's routing.json; answers stay the same. On CPUs, in replicas of one "
        "worker (pipeline and expert 1). Default: Off.",
    )


class Engine(Model):
    """How a worker runs the model."""

    context_length: int | None = Field(
        default=None,
        description="Maximum number of tokens of prompt and continuation together. Default: the "
        "checkpoint's own limit (max_position_embeddings in its config.json).",
        json_schema_extra=rules(number_between("contextLength is a number of tokens", 1, 4194304)),
    )
    max_batch_size: int | None = Field(
        default=None,
        description="Maximum number of requests that a worker decodes together; more wait in its queue. "
        "Default: 256 where a worker takes whole GPUs (nvidia.com/gpu), otherwise 16.",
        json_schema_extra=rules(number_between("maxBatchSize is a number of requests", 1, 4096)),
    )
    kv_memory: Quantity | None = Field(
        default=None,
        description="Memory of one worker for the KV cache, on its device: a quantity such as 512Mi or "
        "40Gi, or a number of bytes; 1Mi to 1Pi. What running requests do not need keeps prefixes of "
        "prompts. Default: where a worker takes whole GPUs, room for maxBatchSize requests of the longest "
        "context, at most what weights and forward passes leave; otherwise 512Mi.",
        json_schema_extra=rules(
            (
                quantity_between("1Mi", "1Pi"),
                "kvMemory is an amount of memory of 1Mi or more, e.g. 512Mi or 40Gi, and at most 1Pi",
            )
        ),
    )
    kv_offload: Quantity | None = Field(
        default=None,
        description="CPU memory of one worker for cached prefixes that its KV cache evicts: a quantity such "
        "as 16Gi, or a number of bytes; 1Mi to 1Pi. They come back where that is faster than computing them "
        "again. Add it to worker.resources. Default: none.",
        json_schema_extra=rules(
            (
                quantity_between("1Mi", "1Pi"),
                "kvOffload is an amount of memory of 1Mi or more, e.g. 512Mi or 16Gi, and at most 1Pi",
            )
        ),
    )
    prefill_tokens: int | None = Field(
        default=None,
        description="Maximum number of prompt tokens of one step of the engine; longer prompts take several. "
        "Larger steps compute prompts faster and let running requests wait longer. Default: 2048.",
        json_schema_extra=rules(number_between("prefillTokens is a number of tokens", 1, 1048576)),
    )
    target_step_milliseconds: int | None = Field(
        default=None,
        description="Target time between two tokens of a running request: steps take as many prompt tokens "
        "as meet it, at most prefillTokens. Default: 50.",
        json_schema_extra=rules(
            number_between("targetStepMilliseconds is a number of milliseconds", 1, 3600000)
        ),
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="Number format of weights and activations; auto takes bfloat16 on GPUs and float32 on "
        "CPUs. Default: auto.",
    )
    format: Literal["auto", "dense", "fp8", "w4a16", "w4a8"] = Field(
        default="auto",
        description="How weights are multiplied. dense: numbers of dtype. fp8: eight bits in blocks of "
        "128 x 128, rounded at load unless the checkpoint is already fp8. w4a16: four bits in"
        " groups of 128, likewise. w4a8: as w4a16, with activations in eight bits, one scale "
        "for 128 or 64 values, the same on CPUs and GPUs. auto: w4a16 for a checkpoint in "
        "four bits, otherwise dense. Default: auto.",
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "fp8"] = Field(
        default="auto",
        description="Number format of the KV cache; auto takes that of dtype; fp8 takes half the memory of "
        "bfloat16. Default: auto.",
    )
    generation_config: Literal["Auto", "None"] = Field(
        default="None",
        description="Sampling of requests that do not set it. Auto: temperature, top_p, top_k, min_p, "
        "repetition_penalty and max_tokens are those of the checkpoint's generation_config.json. None: "
        "greedy, 128 tokens. Default: None.",
    )
    verification: Literal["None", "Weights", "Digests"] = Field(
        default="Weights",
        description="What a worker checks before it serves a checkpoint. None: nothing. Weights: all "
        "weights are finite numbers. Digests: that, and the files have the SHA-256 digests stored with them "
        "(*.sha256, SHA256SUMS, the index, a Hugging Face cache). Default: Weights.",
    )
    config_override: str | None = Field(
        default=None,
        max_length=4096,
        description="A JSON object of fields that replace those of the checkpoint's config.json, such as "
        "rope_scaling for YaRN. Default: none.",
        json_schema_extra=rules(
            (
                "self.startsWith('{')",
                """configOverride is a JSON object as a string, e.g. '{"rope_scaling": {...}}'""",
            )
        ),
    )
    routing: EngineRouting = Field(
        default=EngineRouting(),
        description="Which experts a token uses, and how many. Default: as the checkpoint says.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where the model runs; auto takes a GPU when the pod has one, and must find one where a "
        "worker takes whole GPUs and kvMemory is not set. Default: auto.",
    )

    @property
    def kv_offload_bytes(self) -> int:
        """`kv_offload` in bytes; 0: none."""
        return 0 if self.kv_offload is None else int(quantity.parse(self.kv_offload))

    @property
    def routing_mass(self) -> float | None:
        """`routing.mass` as a number."""
        return None if self.routing.mass is None else float(quantity.parse(self.routing.mass))

    @property
    def routing_margin(self) -> float:
        """`routing.margin` as a number."""
        return 0.0 if self.routing.margin is None else float(quantity.parse(self.routing.margin))
