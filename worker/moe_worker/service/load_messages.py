"""Responses of WorkerService, from the engine's counters."""

from google.protobuf.timestamp_pb2 import Timestamp

from moe_api.worker.v1 import worker_pb2
from moe_worker.config.mesh import MeshReport
from moe_worker.engine.requests import Load
from moe_worker.engine.statistics import ExpertStatistics, Statistics
from moe_worker.service.instruments import Histogram
from moe_worker.service.request_metrics import RequestMetrics


def load_message(
    load: Load,
    statistics: Statistics,
    step_s: float,
    requests: RequestMetrics,
    mesh: MeshReport | None = None,
) -> worker_pb2.Load:
    """The load of the worker, and its sums; `step_s` is the time of all steps in seconds."""
    started = Timestamp()
    started.FromNanoseconds(requests.started_ns)
    return worker_pb2.Load(
        queued=load.queued,
        running=load.running,
        kv_tokens_capacity=load.kv_tokens_capacity,
        kv_tokens_used=load.kv_tokens_used,
        kv_tokens_cached=load.kv_tokens_cached,
        started=started,
        requests_received=requests.received,
        requests_refused=requests.refused,
        requests_completed=requests.completed,
        requests_expired=requests.expired,
        prompt_tokens=statistics.prompt_tokens,
        prefix_hit_tokens=statistics.prefix_hit_tokens,
        output_tokens=statistics.output_tokens,
        preemptions=statistics.preemptions,
        steps=statistics.steps,
        step_seconds=step_s,
        largest_gap_seconds=requests.largest_gap_s,
        time_to_first_token_seconds=_histogram(requests.first_token.histogram),
        time_per_output_token_seconds=_histogram(requests.output_token.histogram),
        request_seconds=_histogram(requests.whole),
        mesh=None if mesh is None else mesh_message(mesh),
    )


def mesh_message(mesh: MeshReport) -> worker_pb2.Mesh:
    """The processes of the replica."""
    return worker_pb2.Mesh(
        pipeline=mesh.pipeline,
        expert=mesh.expert,
        epoch=mesh.epoch,
        stages=[worker_pb2.Stage(first_layer=first, layers=layers) for first, layers in mesh.stages],
        ready_ranks=mesh.ready_ranks,
        redundant_experts=mesh.redundant,
        rebalances=mesh.rebalances,
    )


def expert_message(experts: ExpertStatistics) -> worker_pb2.ExpertLoad:
    """The tokens of each expert, and what was learned of domains."""
    layers = [
        worker_pb2.ExpertLayer(
            layer=layer.layer, tokens=layer.tokens, active=layer.active, rank_tokens=layer.rank_tokens
        )
        for layer in experts.layers
    ]
    domains = [
        worker_pb2.ExpertDomain(
            name=domain.name,
            tokens=domain.tokens,
            shares=[worker_pb2.ExpertShares(experts=row) for row in domain.shares],
        )
        for domain in experts.domains
    ]
    return worker_pb2.ExpertLoad(
        steps=experts.steps,
        layers=layers,
        domains=domains,
        fit=experts.fit,
        tokens=experts.tokens,
        experts_per_token=experts.experts_per_token,
    )


def _histogram(histogram: Histogram) -> worker_pb2.Histogram:
    return worker_pb2.Histogram(bounds=histogram.bounds, counts=histogram.counts, sum=histogram.sum)
