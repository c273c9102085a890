"""Calls of a reconcile to one pod: GetModel and Drain of a leader, progress of a download."""

from __future__ import annotations

from typing import Final

import grpc

from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.visible import one_line
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_operator.errors import RetryableError
from moe_operator.observed.downloads import Download
from moe_operator.resources.status import REPORTED_NAME_MOST, ModelInfo
from moe_operator.rpc.dialing import PLAINTEXT, Dialer, answers_up_to

_INT64_MOST = 2**63 - 1
_LONGEST_S: Final = 30 * 24 * 3600
CHANNEL_OPTIONS: Final = answers_up_to(64 * 1024)
"""Options of channels to workers: the responses that the operator reads have a few KiB."""
_MODEL_OPTIONS: Final = answers_up_to(1 << 20)
"""GetModel's response contains the chat template, of up to 256 KiB."""


def get_model(address: str, revision: str, timeout_seconds: float, dialer: Dialer = PLAINTEXT) -> ModelInfo:
    """The model that the worker at an address serves, which is known to have this revision.

    Raises RetryableError if it does not respond within the timeout.
    """
    with dialer.channel(address, _MODEL_OPTIONS) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            model = stub.GetModel(inference_pb2.GetModelRequest(), timeout=timeout_seconds)
        except grpc.RpcError as error:
            raise RetryableError(f"GetModel of the worker at {address} failed: {error}") from error
    return ModelInfo(
        architecture=one_line(model.architecture, REPORTED_NAME_MOST),
        parameters_total=min(model.parameters_total, _INT64_MOST),
        parameters_active=min(model.parameters_active, _INT64_MOST),
        format=one_line(model.format, REPORTED_NAME_MOST),
        context_length=model.context_length,
        revision=revision,
    )


def download(address: str, timeout_seconds: float) -> Download | None:
    """How far the pod at an IP address has downloaded the model; None when it does not say so in time.

    The init container that downloads serves nothing else, in plaintext.
    """
    with PLAINTEXT.channel(address, CHANNEL_OPTIONS) as channel:
        try:
            stub = worker_pb2_grpc.FetchServiceStub(channel)
            told = stub.GetProgress(worker_pb2.GetProgressRequest(), timeout=timeout_seconds)
        except grpc.RpcError:
            return None
    if not 0 < told.total_bytes <= _INT64_MOST:
        return None
    return Download(min(told.bytes, told.total_bytes), told.total_bytes, min(told.seconds_left, _LONGEST_S))


def drain(address: str, timeout_seconds: float, dialer: Dialer = PLAINTEXT) -> bool:
    """Tells the worker at an address to accept no more requests; returns whether it responded."""
    with dialer.channel(address, CHANNEL_OPTIONS) as channel:
        try:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            stub.Drain(worker_pb2.DrainRequest(), timeout=timeout_seconds)
        except grpc.RpcError:
            return False
    return True
