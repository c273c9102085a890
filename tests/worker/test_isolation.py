"""A sequence whose numbers are broken fails alone: the others get the tokens they get without it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.requests import FinishReason, Request
from moe_worker.sampling.parameters import SamplingParameters
from tests.checkpoints import write_checkpoint

BROKEN = 300  # a token whose embedding is NaN
BANNED = ((BROKEN, -100.0),)
GOOD = [[5, 6, 7], [9] * 21, [11 + i for i in range(40)]]
FORMATS = ["dense", "w4a16", "w4a8"]
ENDLESS = {"eos_token_id": None, "max_position_embeddings": 256}


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3_moe"])
def checkpoint(request, tmp_path_factory):
    directory = write_checkpoint(
        tmp_path_factory.mktemp("broken"), family=request.param, tie_word_embeddings=False, **ENDLESS
    )
    [file] = directory.glob("*.safetensors")
    weights = load_file(file)
    weights["model.embed_tokens.weight"][BROKEN] = torch.nan
    save_file(weights, file, {"format": "pt"})
    return directory


def core_of(checkpoint, number_format, **options):
    settings = EngineOptions(
        device="cpu", dtype="float32", format=number_format, context_length=128, threads=1,
        check_weights=False, **options,
    )  # fmt: skip
    return EngineCore(load(checkpoint, settings, progress=False), settings)


def run(core, prompts, sampling):
    """The tokens of each prompt and how it ended, submitted together."""
    for number, prompt in enumerate(prompts):
        core.submit(Request(number, tuple(prompt), sampling, seed=7))
    tokens, reasons = [[] for _ in prompts], {}
    while not core.idle:
        for delta in core.step():
            reasons[delta.id] = delta.finish_reason
            if delta.token is not None:
                tokens[delta.id].append(delta.token)
    return tokens, [reasons[number] for number in range(len(prompts))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("number_format", FORMATS)
def test_a_broken_sequence_fails_alone(checkpoint, number_format, temperature):
    """Its pages are the first of the cache, those that page tables of short sequences are filled with."""
    sampling = SamplingParameters(max_tokens=12, temperature=temperature, logit_bias=BANNED)
    broken = [BROKEN, *range(2, 60)]
    tokens, reasons = run(core_of(checkpoint, number_format), [broken, *GOOD], sampling)
    expected, _ = run(core_of(checkpoint, number_format), [[4, *broken[1:]], *GOOD], sampling)
    assert reasons == [FinishReason.FAILED, *[FinishReason.LENGTH] * 3]
    assert tokens[0] == []
    assert tokens[1:] == expected[1:]


@pytest.mark.parametrize("number_format", FORMATS)
def test_its_pages_and_its_prefix_serve_others(checkpoint, number_format):
    """The same core afterwards: pages are used again, and what stands before the broken token is shared."""
    sampling, prefix = SamplingParameters(max_tokens=12, logit_bias=BANNED), [20 + i for i in range(32)]
    core, fresh = (core_of(checkpoint, number_format, max_batch_size=4) for _ in range(2))
    _, reasons = run(core, [[*prefix, BROKEN, 3]] * 4, sampling)
    assert reasons == [FinishReason.FAILED] * 4
    prompts = [[*prefix, 3, 4], *GOOD]
    assert run(core, prompts, sampling) == run(fresh, prompts, sampling)


@pytest.mark.parametrize("number_format", FORMATS)
def test_a_broken_token_leaves_the_page_before_it_whole(checkpoint, number_format):
    """Prompts in pieces of 5 tokens, so that the last token of a page and the first of the next, which is the
    broken one, are computed side by side; the page serves others.
    """
    sampling, prefix = SamplingParameters(max_tokens=12, logit_bias=BANNED), [20 + i for i in range(16)]
    core, fresh = (core_of(checkpoint, number_format, prefill_tokens=5) for _ in range(2))
    _, reasons = run(core, [[*prefix, BROKEN, 3, 4, 5, 6, 7]], sampling)
    assert reasons == [FinishReason.FAILED]
    prompts = [[*prefix, 3, 4]]
    assert run(core, prompts, sampling) == run(fresh, prompts, sampling)
