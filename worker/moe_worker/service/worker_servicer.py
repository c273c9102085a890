"""moe_api.worker.v1.WorkerService of a worker."""

import asyncio

from moe_api import rich_status
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_api.writing import SlowReaderError, Writer
from moe_worker.engine.requests import Load
from moe_worker.engine.statistics import Statistics
from moe_worker.errors import WorkerError
from moe_worker.service import answers
from moe_worker.service.load_messages import expert_message, load_message
from moe_worker.service.servicers import Context, InferenceService, Phase, Served


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """moe_api.worker.v1.WorkerService; GetLoad responds at once, from the engine's last report.

    stop: set when the worker shall drain and end.
    """

    def __init__(self, inference: InferenceService, stop: asyncio.Event) -> None:
        self._inference = inference
        self._stop = stop

    async def Drain(  # noqa: N802
        self,
        request: worker_pb2.DrainRequest,  # noqa: ARG002
        context: Context,
    ) -> worker_pb2.Drained:
        """Accepts no more requests; the worker ends after the active ones."""
        served = await self._loaded(context)
        self._inference.phase = Phase.DRAINING
        self._stop.set()
        return worker_pb2.Drained(requests=served.engine.requests)

    async def GetLoad(self, request: worker_pb2.GetLoadRequest, context: Context) -> worker_pb2.Load:  # noqa: N802, ARG002
        """Returns the load of this worker."""
        served, requests = self._inference.served, self._inference.metrics
        if served is None:
            return load_message(Load(), Statistics(), 0.0, requests)
        engine = served.engine
        return load_message(engine.current_load, engine.statistics, engine.step_s, requests, engine.mesh)

    async def WatchCache(  # type: ignore[override]  # noqa: N802 - the stubs know generators only
        self,
        request: worker_pb2.WatchCacheRequest,  # noqa: ARG002
        context: Context,
    ) -> None:
        """Streams which blocks of prompts the cache holds."""
        served = await self._loaded(context)
        try:
            with served.engine.cached.receiver() as receiver:
                writer, number = Writer(context, self._inference.write_timeout_s), 0
                async for change in receiver.changes():
                    number += 1
                    await writer.write(
                        worker_pb2.CacheChange(
                            sequence=number, reset=change.reset, stored=change.stored, evicted=change.evicted
                        )
                    )
        except WorkerError as error:
            await rich_status.abort(context, answers.of_error(error))
        except SlowReaderError as error:
            await rich_status.abort(context, error.status)
        await rich_status.abort(context, answers.unavailable("this worker ends; watch another one"))

    async def GetExpertLoad(  # noqa: N802
        self,
        request: worker_pb2.GetExpertLoadRequest,  # noqa: ARG002
        context: Context,
    ) -> worker_pb2.ExpertLoad:
        """Returns the tokens of each expert."""
        served = await self._loaded(context)
        try:
            return expert_message(await served.engine.expert_statistics())
        except WorkerError as error:
            await rich_status.abort(context, answers.of_error(error))

    async def _loaded(self, context: Context) -> Served:
        """The model; ends the call while it is still loading."""
        if self._inference.served is None:
            await rich_status.abort(context, answers.unavailable(Phase.LOADING.value))
        return self._inference.served
