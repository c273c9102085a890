"""The engine as a Python library."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from moe_worker.config.directory import find_checkpoint
from moe_worker.config.engine import EngineOptions
from moe_worker.config.model import ModelConfig
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import Delta, FinishReason, Request, prompt_violations
from moe_worker.errors import RequestError, SettingsError
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.runner import TellsChoices
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.moe.counting import Counter
from moe_worker.sampling.defaults import sampling_defaults
from moe_worker.sampling.grammar import format_violations
from moe_worker.sampling.logprobs import TokenLogprobs
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.sampling.parameters import SamplingParameters


@dataclass(frozen=True)
class GenerationResult:
    """A continuation; `token_ids` includes the end-of-text token.

    finish_reason: "stop" or "length"; "format" where the output format became too complex to go on with, and
    "failed" where the model gave no valid probabilities. prompt_logprobs: of the tokens of the prompt from
    the second one on, if they were requested.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Engine:
    """A model loaded for offline use.

    `path` is a Hugging Face checkpoint directory; `device`, `dtype`, `format` and the further `options` are
    those of EngineOptions. Raises WorkerError with a message if the checkpoint or an option cannot work.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        format: str = "auto",  # noqa: A002 - the field's word
        *,
        progress: bool = False,
        **options: Any,
    ) -> None:
        self._options = EngineOptions(device=device, dtype=dtype, format=format, **options)
        self._loaded = load(Path(path), self._options, progress)
        self._defaults = sampling_defaults(find_checkpoint(Path(path)), self._options.generation_config)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    def expert_counter(self) -> Counter:
        """Counts the experts of the calls of `logits` from now on; it wants to be told after each."""
        return self._loaded.runner.expert_counter()

    def choices(self, token_ids: Sequence[int]) -> list[Tensor]:
        """The routed experts of each of `token_ids`, [T, K], of each layer with experts in order; -1: none.

        Raises SettingsError where the kernels do not tell them, and RequestError.
        """
        runner = self._loaded.runner
        if not isinstance(runner, TellsChoices):
            raise SettingsError("these kernels do not tell the experts of tokens; use device cpu")
        runner.keep_choices()
        self.logits(token_ids)
        return runner.choices()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        sampling: SamplingParameters | None = None,
        output_format: OutputFormat | None = None,
    ) -> list[GenerationResult]:
        """Continues each prompt; returns one result for each, in order.

        A prompt is a text (the begin-of-text token is prepended) or a list of token ids, used as given. A
        single prompt may be given without a list. output_format: what each continuation must be.
        Raises RequestError.
        """
        sampling = sampling or self._defaults
        requests = [
            Request(number, self._prompt(prompt), sampling, _seed(sampling), output_format=output_format)
            for number, prompt in enumerate(_listed(prompts))
        ]
        for request in requests:
            self._check(request)
        core = EngineCore(self._loaded, replace(self._options, max_queue=len(requests)))
        for request in requests:
            core.submit(request)
        return _collect(core, requests)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Scores of the token after each of `token_ids`: float32 [positions, vocabulary] on the CPU.

        The sequence is used as given (no begin-of-text token is prepended) and may be as long as the context
        length. Raises RequestError.
        """
        check_token_ids(token_ids, self.config.vocab_size, self._loaded.context)
        runner, shape, device = self._loaded.runner, self._loaded.cache.shape, self._loaded.device
        scratch = PagedCache.allocate(shape, shape.pages_for(len(token_ids)), device)
        segment = Segment(token_ids, 0, range(scratch.pages))
        return runner.logits(Batch.of([segment], scratch), scratch, range(len(token_ids))).float().cpu()

    def _prompt(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    def _check(self, request: Request) -> None:
        context = self._loaded.context
        violations = prompt_violations("prompt", request.prompt, self.config.vocab_size, context)
        found = request.sampling.violations(self.config.vocab_size)
        found += request.sampling.prompt_violations(len(request.prompt))
        if request.output_format is not None:
            ends = frozenset(self.config.eos_token_ids)
            found += format_violations(request.output_format, request.sampling, ends)
        for violation in violations + found:
            raise RequestError(violation.field, f"{violation.field} {violation.description}")


def _listed(
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
) -> list[str | Sequence[int]]:
    """A single prompt as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[str | Sequence[int]]", prompts))


def _seed(sampling: SamplingParameters) -> int:
    return secrets.randbits(64) if sampling.seed is None else sampling.seed


def _collect(core: EngineCore, requests: Sequence[Request]) -> list[GenerationResult]:
    deltas: dict[int, list[Delta]] = {request.id: [] for request in requests}
    while not core.idle:
        for delta in core.step():
            deltas[delta.id].append(delta)
    return [_result(request, deltas[request.id]) for request in requests]


def _result(request: Request, deltas: Sequence[Delta]) -> GenerationResult:
    return GenerationResult(
        text="".join(delta.text for delta in deltas),
        token_ids=[delta.token for delta in deltas if delta.token is not None],
        finish_reason=(deltas[-1].finish_reason or FinishReason.LENGTH).value,
        prompt_tokens=len(request.prompt),
        prompt_logprobs=tuple(score for delta in deltas for score in delta.prompt),
    )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, context: int) -> None:
    """Raises RequestError unless there are 1 to `context` ids, each below `vocab_size`."""
    if not 1 <= len(token_ids) <= context:
        raise RequestError("token_ids", f"{len(token_ids)} token ids were given; it must be 1 to {context}")
    wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError("token_ids", f"token id {wrong} is unknown; ids are 0 to {vocab_size - 1}")
