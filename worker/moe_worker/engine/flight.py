"""A launched step, and the tokens that it samples, which are copied to the host.

Legend: B rows that sample, T tokens of a step.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moe_worker.engine.scoring import Span
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.sampler import Logprobs, Sampled
from moe_worker.scheduler.plan import Step

S = TypeVar("S")
Outcome = tuple[Sampled | None, Logprobs | None]


class Flight(Generic[S]):
    """`sampling`: the requests that sample, in order, each with its state in the engine.

    rows: where each request samples. guided: whether the guides of its texts have taken its tokens; complete:
    rows whose texts then have their format, and end. spans: tokens of prompts that it scores. decoded: tokens
    of the step that are not of a prompt or a resumed stream.
    """

    def __init__(
        self,
        step: Step,
        sampling: Sequence[tuple[int, S]],
        outcome: Callable[[], Outcome],
        spans: Sequence[Span],
        decoded: int,
    ) -> None:
        """outcome: samples, and returns the tokens and the scores of all spans."""
        self.step = step
        self.spans = spans
        self.decoded = decoded
        self.sampling = sampling
        self.guided = False
        self.complete: set[int] = set()
        self.rows = {name: row for row, (name, _) in enumerate(sampling)}
        self._outcome: Callable[[], Outcome] | None = outcome
        self._sampled: Sampled | None = None
        self._scores: Logprobs | None = None
        self._arrived: torch.cuda.Event | None = None

    @property
    def finished(self) -> bool:
        """Whether it has been sampled; until then the last stage of a pipeline may still compute it."""
        return self._outcome is None

    def finish(self) -> None:
        """Samples, unless it has, and starts to copy the results from the device; steps finish in order.

        Raises torch.OutOfMemoryError, and MeshError if a rank of a mesh is lost.
        """
        if self._outcome is None:
            return
        sampled, self._scores = self._outcome()
        self._outcome, self._sampled = None, sampled
        if sampled is not None:
            self._host_tokens_B = _to_host(sampled.tokens_B)
            self._host_failed_B = _to_host(sampled.failed_B)
            # Copied now, because a later copy would wait for the step launched since.
            self._logprobs: Logprobs | None = sampled.logprobs and sampled.logprobs.moved(_to_host)
        scores = self._scores
        copied = sampled.tokens_B if sampled is not None else None if scores is None else scores.chosen_L
        self._scores = scores and scores.moved(_to_host)
        if copied is not None and copied.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def arrive(self) -> None:
        """Waits until the results of a finished step are on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def scores(self) -> list[TokenLogprobs]:
        """Of the tokens of all spans, one span after the other; waits for the device. Finished steps only."""
        if self._scores is None:
            return []
        self.arrive()
        return list(self._scores.listed().values())

    def wait(self) -> tuple[list[int], list[bool], dict[int, TokenLogprobs]]:
        """Tokens, failed rows, and log-probabilities by row, of a finished step."""
        if self._sampled is None:
            return [], [], {}
        self.arrive()
        logprobs = {} if self._logprobs is None else self._logprobs.listed()
        return self._host_tokens_B.tolist(), self._host_failed_B.tolist(), logprobs

    @property
    def tokens_B(self) -> Tensor:  # noqa: N802 - a tensor's name contains its shape
        """The sampled tokens on the device, int64. Raises ValueError unless the step has sampled any."""
        if self._sampled is None:
            raise ValueError("this step has sampled nothing")
        return self._sampled.tokens_B


def _to_host(values: Tensor) -> Tensor:
    """An asynchronous copy; a CPU tensor unchanged."""
    if not values.is_cuda:
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
