"""`moe-worker serve`."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from moe_api import lengths
from moe_api.address import check_address
from moe_api.ranges import FiniteRange
from moe_api.visible import guard_logs
from moe_api.writing import WRITE_TIMEOUT_S
from moe_worker.config.directory import find_checkpoint
from moe_worker.config.engine import (
    BOUNDS,
    DTYPES,
    FORMATS,
    GENERATION_CONFIGS,
    KV_DTYPES,
    REBALANCE,
    EngineOptions,
)
from moe_worker.config.fields import LARGEST_SIZE, is_unicode
from moe_worker.config.quality import check_quality
from moe_worker.config.quantity import parse_bytes
from moe_worker.errors import SettingsError
from moe_worker.fetch.cache import hold
from moe_worker.service.following import follow
from moe_worker.service.server import GRACE_S, ServeSettings
from moe_worker.service.server import serve as run
from moe_worker.service.watchdog import STALL_TIMEOUT_S

LARGEST_OVERRIDE = 1 << 16
LISTEN = "127.0.0.1:8000"


def _integer(name: str) -> click.IntRange:
    """The type of a number's option. EngineOptions refuses what is so large that help need not say."""
    least, most = BOUNDS[name]
    return click.IntRange(int(least), None if most >= LARGEST_SIZE else int(most))


@click.command()
@click.option(
    "--model",
    required=True,
    type=click.Path(path_type=Path),
    help="Checkpoint directory (Hugging Face layout).",
)
@click.option("--served-name", help="Name of the model for clients. Default: the directory's name.")
@click.option(
    "--listen",
    show_default=f"{LISTEN}; a rank that follows: nowhere",
    help="HOST:PORT of the gRPC server; 0.0.0.0 and [::]: all addresses, of IPv4 and IPv6. A rank that "
    "follows answers only health probes there.",
)
@click.option(
    "--context-length",
    type=_integer("context_length"),
    help="Tokens of prompt and continuation together. Default: the model's limit.",
)
@click.option(
    "--config-override",
    default="{}",
    callback=lambda _context, _option, text: _override(text),
    help='JSON object of fields that replace config.json\'s, e.g. \'{"rope_scaling": {"rope_type": '
    '"yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}\'. Default: none.',
)
@click.option(
    "--max-batch-size",
    type=_integer("max_batch_size"),
    default=16,
    show_default=True,
    help="Sequences computed together, at most.",
)
@click.option(
    "--max-queue",
    type=_integer("max_queue"),
    default=256,
    show_default=True,
    help="Requests that may wait beyond the batch.",
)
@click.option(
    "--kv-memory",
    help="Bytes for the KV cache, e.g. 2Gi; more than a full batch needs keeps more prefixes. Default: room "
    "for a full batch, on a GPU at most what weights and forward passes leave.",
)
@click.option(
    "--kv-offload",
    default="0",
    show_default=True,
    help="Bytes of CPU memory, e.g. 16Gi, for cached prefixes that the KV cache evicts; they come back where "
    "that is faster than computing them again. Pinned on GPUs.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype", default="auto", show_default=True, help=", ".join(DTYPES) + " (auto: float32 on CPUs)."
)
@click.option(
    "--format",
    default="auto",
    show_default=True,
    help="Of weights: " + ", ".join(FORMATS) + " (auto: four bits if the checkpoint has them, else dense).",
)
@click.option(
    "--kv-dtype",
    default="auto",
    show_default=True,
    help="Of the KV cache: " + ", ".join(KV_DTYPES) + " (auto: that of --dtype; fp8: half of bfloat16).",
)
@click.option(
    "--prefill-tokens",
    type=_integer("prefill_tokens"),
    default=EngineOptions.prefill_tokens,
    show_default=True,
    help="Prompt tokens of one step, at most.",
)
@click.option(
    "--target-step-ms",
    type=FiniteRange(*BOUNDS["target_step_ms"]),
    default=EngineOptions.target_step_ms,
    show_default=True,
    help="Target time between two tokens of a stream: prompts are split into chunks to meet it.",
)
@click.option(
    "--page-size",
    type=_integer("page_size"),
    default=16,
    show_default=True,
    help="Tokens of a page of the KV cache.",
)
@click.option(
    "--prefix-cache/--no-prefix-cache",
    default=True,
    show_default=True,
    help="Compute common prefixes of prompts once.",
)
@click.option(
    "--revision",
    default="",
    envvar="MOE_WORKER_REVISION",
    show_envvar=True,
    help="Identifies how the model is served; only workers of one revision continue each other's streams. "
    "Default: none.",
)
@click.option(
    "--stall-timeout",
    type=FiniteRange(min=0, min_open=True),
    default=STALL_TIMEOUT_S,
    envvar="MOE_WORKER_STALL_TIMEOUT",
    show_envvar=True,
    show_default=True,
    help="Seconds without a step after which an engine with requests to compute counts as hung. The worker "
    "then ends, and other workers continue its streams.",
)
@click.option(
    "--write-timeout",
    type=FiniteRange(min=0, min_open=True),
    default=WRITE_TIMEOUT_S,
    envvar="MOE_WORKER_WRITE_TIMEOUT",
    show_envvar=True,
    show_default=True,
    help="Seconds that a client may read nothing from its stream; then the stream is stopped.",
)
@click.option(
    "--grace",
    type=FiniteRange(min=0),
    default=GRACE_S,
    envvar="MOE_WORKER_GRACE",
    show_envvar=True,
    show_default=True,
    help="Seconds that running requests get to finish after SIGTERM; then other workers continue them. Keep "
    "it below the pod's terminationGracePeriodSeconds.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=0,
    envvar="MOE_WORKER_METRICS_PORT",
    show_envvar=True,
    help="Port where Prometheus fetches metrics (/metrics). Default: none.",
)
@click.option(
    "--tls",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar="MOE_WORKER_TLS",
    show_envvar=True,
    metavar="FOLDER",
    help="Serves over TLS, with tls.crt and tls.key of this folder; clients need a certificate of its "
    "ca.crt. Ranks of a mesh reach their leader over TLS, too; tensors stay in plaintext. Renewed files are "
    "used within seconds, for new connections. Default: plaintext.",
)
@click.option(
    "--health",
    envvar="MOE_WORKER_HEALTH",
    show_envvar=True,
    metavar="HOST:PORT",
    help="Answers health probes here as well, in plaintext: those of Kubernetes know no TLS. Default: none.",
)
@click.option(
    "--max-bits-per-byte-increase",
    type=FiniteRange(min=0),
    help="Refuse a checkpoint that is worse than its original by more, by its quality.json. Default: no "
    "limit.",
)
@click.option("--quality-text", help="Name of the text that its quality.json must have scored. Default: any.")
@click.option(
    "--generation-config",
    type=click.Choice(GENERATION_CONFIGS),
    default="none",
    show_default=True,
    help="auto: where a request sets no temperature, top_p, top_k, min_p, repetition_penalty or max_tokens, "
    "those of the checkpoint's generation_config.json hold.",
)
@click.option(
    "--check-weights/--no-check-weights",
    default=True,
    envvar="MOE_WORKER_CHECK_WEIGHTS",
    show_envvar=True,
    show_default=True,
    help="Refuse weights that are not finite numbers.",
)
@click.option(
    "--check-digests/--no-check-digests",
    default=False,
    envvar="MOE_WORKER_CHECK_DIGESTS",
    show_envvar=True,
    show_default=True,
    help="Before loading, compare files with the SHA-256 digests stored with them (*.sha256, SHA256SUMS, "
    "the index, a Hugging Face cache).",
)
@click.option(
    "--threads",
    type=_integer("threads"),
    envvar="MOE_WORKER_THREADS",
    show_envvar=True,
    help="Threads of torch. Default: the usable cores; 1 for small models.",
)
@click.option(
    "--mesh",
    default="1x1",
    envvar="MOE_WORKER_MESH",
    show_envvar=True,
    show_default=True,
    help="Processes of this replica, PIPELINExEXPERT: stages of layers, and ranks of a stage that share its "
    "experts. Start each with its --mesh-rank and the same MOE_WORKER_MESH_SECRET.",
)
@click.option(
    "--mesh-rank",
    type=_integer("mesh_rank"),
    default=0,
    envvar="MOE_WORKER_MESH_RANK",
    show_envvar=True,
    show_default=True,
    help="Rank of this process in the mesh. Rank 0 serves clients and directs the others.",
)
@click.option(
    "--mesh-leader",
    default="",
    envvar="MOE_WORKER_MESH_LEADER",
    show_envvar=True,
    help="HOST:PORT where rank 0 meets the others. Default: none, for a mesh of one process.",
)
@click.option(
    "--mesh-epoch",
    type=_integer("mesh_epoch"),
    default=0,
    envvar="MOE_WORKER_MESH_EPOCH",
    show_envvar=True,
    show_default=True,
    help="How often the mesh has formed; ranks of another epoch are refused.",
)
@click.option(
    "--redundant-experts",
    type=_integer("redundant_experts"),
    default=0,
    envvar="MOE_WORKER_REDUNDANT_EXPERTS",
    show_envvar=True,
    show_default=True,
    help="Copies of experts in each layer, in addition to the model's own, spread over a stage's ranks.",
)
@click.option(
    "--mesh-reforms",
    type=_integer("mesh_reforms"),
    default=EngineOptions.mesh_reforms,
    envvar="MOE_WORKER_MESH_REFORMS",
    show_envvar=True,
    show_default=True,
    help="How often in 10 minutes a mesh may lose ranks and meet again; after that the replica ends.",
)
@click.option(
    "--rebalance",
    type=click.Choice(REBALANCE),
    default="auto",
    envvar="MOE_WORKER_REBALANCE",
    show_envvar=True,
    show_default=True,
    help="auto: while a mesh on CPUs serves, experts move between the ranks of a stage whose load differs; "
    "on: on GPUs, too, where some steps take several times as long meanwhile.",
)
@click.option(
    "--rebalance-interval",
    type=FiniteRange(*BOUNDS["rebalance_interval"]),
    default=EngineOptions.rebalance_interval,
    envvar="MOE_WORKER_REBALANCE_INTERVAL",
    show_envvar=True,
    show_default=True,
    help="Seconds between two rebalancings, at least; loads that are so old count half.",
)
@click.option(
    "--rebalance-threshold",
    type=FiniteRange(*BOUNDS["rebalance_threshold"]),
    default=EngineOptions.rebalance_threshold,
    envvar="MOE_WORKER_REBALANCE_THRESHOLD",
    show_envvar=True,
    show_default=True,
    help="Load of the busiest rank over the mean of its stage, above which a layer's experts move.",
)
@click.option(
    "--routing-mass",
    type=FiniteRange(*BOUNDS["routing_mass"]),
    envvar="MOE_WORKER_ROUTING_MASS",
    show_envvar=True,
    help="Share of the scores of a token's experts at which the rest are left out (1: none are). Default: "
    "the checkpoint's; less only as far as its routing.json allows.",
)
@click.option(
    "--routing-margin",
    type=FiniteRange(*BOUNDS["routing_margin"]),
    default=0.0,
    envvar="MOE_WORKER_ROUTING_MARGIN",
    show_envvar=True,
    show_default=True,
    help="Experts whose scores differ by less may take each other's place: those with less load in the "
    "checkpoint's routing.json.",
)
@click.option(
    "--learn-routing/--no-learn-routing",
    default=False,
    envvar="MOE_WORKER_LEARN_ROUTING",
    show_envvar=True,
    show_default=True,
    help="Learn from requests which experts each domain uses, from the checkpoint's routing.json on; "
    "GetExpertLoad tells it. Answers do not change. Needs one process on a CPU.",
)
@click.option(
    "--explain", "explained", is_flag=True, help="Print which kernels would compute what, and exit."
)
def serve(
    model: Path,
    served_name: str | None,
    listen: str | None,
    kv_memory: str | None,
    revision: str,
    explained: bool,
    **options: float | str | Path | Mapping[str, Any] | None,
) -> None:
    """Serve a model over gRPC.

    \b
    Example:
      moe-worker serve --model examples/docs-moe --listen 127.0.0.1:8000

    \b
    Four processes, two stages of two ranks (the others with --mesh-rank 1, 2 and 3):
      moe-worker serve --model examples/docs-moe --mesh 2x2 --mesh-leader 127.0.0.1:29500
    """
    guard_logs()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    most, text = options.pop("max_bits_per_byte_increase"), options.pop("quality_text")
    if isinstance(most, float):
        check_quality(find_checkpoint(model), most, None if text is None else str(text))
    names = ("stall_timeout", "write_timeout", "grace")
    others: dict[str, Any] = {f"{name}_s": options.pop(name) for name in names}
    others |= {name: options.pop(name) for name in ("metrics_port", "tls", "health")}
    options["mesh_tls"] = str(others["tls"] or "")
    if others["health"] is not None:
        others["health"] = _address(others["health"], "--health")
    memory = None if kv_memory is None else parse_bytes(kv_memory, "--kv-memory")
    offload = parse_bytes(str(options.pop("kv_offload")), "--kv-offload")
    engine_options = EngineOptions(kv_memory=memory, kv_offload=offload, **options)  # type: ignore[arg-type]
    if explained:
        from moe_worker.engine.loading import explain_choice  # noqa: PLC0415 - torch: only the engine's process

        for line in explain_choice(model, engine_options):
            click.echo(line)
        return
    held = hold(model)
    name = served_name or Path(os.path.realpath(model)).name
    for flag, text in (("--model", str(model)), ("--served-name", name), ("--revision", revision)):
        if not is_unicode(text):
            raise SettingsError(f"{flag} {text!r} is not text; write it in UTF-8")
    if wrong := lengths.of_name(len(name)):
        raise SettingsError(f"the served name {wrong}: no request could ask for it")
    address = _address(listen or LISTEN)
    settings = ServeSettings(model, name, address, engine_options, revision, **others)
    with held or contextlib.nullcontext():
        if engine_options.mesh_rank:
            follow(settings, None if listen is None else settings.listen)
        else:
            run(settings)


def _override(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text[:LARGEST_OVERRIDE])
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"--config-override is not valid JSON of at most {LARGEST_OVERRIDE} characters "
            f"({str(error)[:100]}); give an object"
        ) from error
    if not isinstance(value, dict):
        raise SettingsError(f"--config-override is {type(value).__name__}; give a JSON object")
    return value


def _address(text: str, flag: str = "--listen") -> str:
    """By default gRPC takes port 443 if there is none, and 99999 modulo 65536."""
    try:
        return check_address(text)
    except ValueError as error:
        raise SettingsError(f"{flag} {error}") from None
