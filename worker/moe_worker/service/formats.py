"""Checks output formats that clients send before the engine compiles them."""

from typing import Final

import msgspec

from moe_api import child_pool
from moe_api.child_pool import ChildPool
from moe_worker.errors import QueueFullError, WorkerError
from moe_worker.sampling import grammar
from moe_worker.sampling.grammar import Verdict
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.sampling.parameters import Violation

CHECK_S: Final = 5.0
"""Of one format, also on a busy machine; `grammar.COMPILE_CPU_S` is the bound of its work."""
_MODULE: Final = "moe_worker.service.format_process"
_FIRST: Final = msgspec.json.encode(OutputFormat("json_object"))
_ANSWER_MOST: Final = 2**20
"""Bytes: a verdict is a sentence."""
_DECODER: Final = msgspec.json.Decoder(Verdict)


class CheckNotStartedError(WorkerError):
    """The process that compiles formats does not start."""

    retryable = True


class Formats:
    """Compiles each format once in a process that can be killed. For one event loop."""

    def __init__(self) -> None:
        self._pool = ChildPool(_MODULE, CHECK_S, _FIRST, _ANSWER_MOST)

    async def violation(self, output_format: OutputFormat) -> Violation | None:
        """Why a format cannot be used.

        Raises:
            WorkerError: it cannot be checked now; a later attempt may succeed.
        """
        if not grammar.available():
            return Violation("output_format", grammar.NOT_INSTALLED)
        problem = await self._problem(output_format)
        return Violation(f"output_format.{output_format.kind}", problem) if problem else None

    async def _problem(self, output_format: OutputFormat) -> str:
        try:
            return _DECODER.decode(await self._pool.ask(msgspec.json.encode(output_format))).problem
        except child_pool.ChildBusyError as error:
            raise QueueFullError("many output formats wait to be compiled; try later", 1.0) from error
        except child_pool.ChildNotStartedError as error:
            raise CheckNotStartedError("the process that compiles output formats does not start") from error
        except child_pool.ChildSlowError:
            return grammar.TOO_SLOW
        except child_pool.ChildEndedError:
            return "takes too much memory to compile; simplify it"

    async def close(self) -> None:
        """Ends the processes."""
        await self._pool.close()
