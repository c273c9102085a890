"""Has templates rendered by processes that can be killed: within a time limit, however the template loops."""

from typing import Any, Final

import msgspec

from moe_api import child_pool
from moe_api.child_pool import ChildPool
from moe_frontend.chat.render_process import Job, Result

RENDER_S: Final = 5.0
"""Of one conversation; published templates take milliseconds."""
_MODULE: Final = "moe_frontend.chat.render_process"
_ANSWER_MOST: Final = 2**27
"""Bytes: callers ask for 16 Mi characters at most, and a character takes 6 bytes of JSON at most."""
_DECODER: Final = msgspec.json.Decoder(Result)


class RenderError(Exception):
    """There is no prompt. The text is for the client."""


class RendererBusyError(RenderError):
    """Too many conversations wait already; a later attempt may succeed."""


class RendererNotStartedError(RenderError):
    """No process starts to render; a later attempt may succeed."""


class Renderer:
    """Renders conversations. For one event loop.

    Args:
        limit_s: how long one conversation may take, in seconds.
    """

    def __init__(self, limit_s: float = RENDER_S) -> None:
        self._limit_s = limit_s
        self._pool = ChildPool(_MODULE, limit_s, msgspec.json.encode(Job("", {}, 0)), _ANSWER_MOST)

    async def render(self, template: str, variables: dict[str, Any], most: int) -> str:
        """The prompt, of `most` characters at most.

        Raises:
            RenderError: there is none.
        """
        job = msgspec.json.encode(Job(template, variables, most))
        try:
            result = _DECODER.decode(await self._pool.ask(job))
        except child_pool.ChildError as error:
            raise self._explained(error) from error
        if result.error:
            raise RenderError(result.error)
        return result.prompt

    async def close(self) -> None:
        """Ends the processes."""
        await self._pool.close()

    def _explained(self, error: child_pool.ChildError) -> RenderError:
        match error:
            case child_pool.ChildBusyError():
                waiting = child_pool.WAITING_MOST
                return RendererBusyError(f"{waiting} conversations wait to be rendered; try later")
            case child_pool.ChildNotStartedError():
                sentence = "the process that renders chat templates does not start; try later"
                return RendererNotStartedError(sentence)
            case child_pool.ChildSlowError():
                limit = f"{self._limit_s:g} s"
                sentence = f"the chat template did not render the conversation within {limit}; shorten it"
                return RenderError(sentence)
            case _:
                return RenderError("the chat template ended its process on the conversation; shorten it")
