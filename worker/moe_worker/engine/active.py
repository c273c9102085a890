"""A request from its submission to its end: the text so far, and its pages in the cache."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_worker.engine.requests import FinishReason, Request
from moe_worker.models.batch import Segment
from moe_worker.sampling.guides import Guide
from moe_worker.sampling.text import TextStream
from moe_worker.scheduler.plan import Chunk


@dataclass
class ActiveRequest:
    """`pages` is the page table. ends: tokens that end the text. shard: where the pages are.

    given: tokens of the prompt and of a resumed stream. generated: tokens of the text, including emitted
    tokens of a resumed stream; sampled: without those. admitted: whether the sampler knows the request.
    guide: of its output format; None: any text is allowed. scores: whether the prompt is scored; scored: its
    tokens, from the first on, whose log-probabilities have been sent.
    """

    request: Request
    text: TextStream
    ends: frozenset[int]
    shard: int = 0
    pages: "array[int]" = field(default_factory=lambda: array("i"))
    generated: int = 0
    sampled: "array[int]" = field(default_factory=lambda: array("i"))
    admitted: bool = False
    guide: Guide | None = None
    scored: int = 0
    given: int = field(init=False)
    scores: bool = field(init=False)

    def __post_init__(self) -> None:
        self.given = len(self.request.prompt) + len(self.request.written)
        self.scores = self.request.scores_prompt

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of the text so far."""
        return len(self.request.prompt) + self.generated

    @property
    def too_complex(self) -> bool:
        """Whether the output format became too complex to go on with."""
        return self.guide is not None and self.guide.failed

    @property
    def output(self) -> tuple[int, ...]:
        """The tokens of the text so far."""
        return (*self.request.written, *self.sampled)

    def follow(self, chunk: Chunk) -> Segment:
        """The model's input for `chunk`."""
        if chunk.pages:
            self.pages[chunk.pages_from :] = array("i", chunk.pages)
        return Segment(chunk.tokens, chunk.start, self.pages, self.shard)

    def resume(self, token_bytes: Callable[[int], bytes]) -> None:
        """Puts the emitted tokens of a resumed stream before the text; the client has them."""
        for token in self.request.written:
            self.text.push(token_bytes(token))
        self.generated = len(self.request.written)

    def take(self, token: int, added: bytes, full: bool, complete: bool) -> tuple[str, FinishReason | None]:
        """Adds a sampled token: the text that can be sent now, and why the request ends here, if it does.

        added: its bytes. full: whether no more tokens are allowed. complete: whether the text has its output
        format now.
        """
        self.generated += 1
        self.sampled.append(token)
        ended = token in self.ends
        text = "" if ended else self.text.push(added)
        stopped = ended or self.text.stopped or complete
        if not (stopped or full):
            return text, None
        return text + self.text.finish(), FinishReason.STOP if stopped else FinishReason.LENGTH
