"""What tests of sampling share: a distribution counted over many seeds, and truth from transformers."""

import torch
from transformers import generation

from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.sampler import Sampler

CPU = torch.device("cpu")


def tokens_of(logits, given, *, seeds=None, ends=(), prompt=(), output=(), device=CPU):
    """One token for each row, each a sequence of its own with parameters `given[row]`."""
    return sampled(logits, given, seeds=seeds, ends=ends, prompt=prompt, output=output, device=device)[
        0
    ].tokens_B.tolist()


def sampled(logits, given, *, seeds=None, ends=(), prompt=(), output=(), device=CPU):
    """What one step gives, and the sampler that made it."""
    sampler = Sampler(logits.shape[1], device, ends)
    for row, parameters in enumerate(given):
        sampler.admit(row, parameters, row if seeds is None else seeds[row], prompt, output)
    return sampler.sample(logits.to(device), range(len(given))), sampler


def counted(logits, count=4000, device=CPU, **fields):
    """How often each token was chosen by `count` sequences of different seeds."""
    parameters = SamplingParameters(**fields)
    tokens = tokens_of(logits.expand(count, -1), [parameters] * count, device=device)
    return torch.tensor(tokens).bincount(minlength=len(logits)).tolist()


def probabilities(logits, parameters, prompt=(), output=()):
    """The distribution (float64 [V]) that transformers' processors leave, in the order of its own."""
    scores_1V = logits.unsqueeze(0).clone()
    ids_1T = torch.tensor([[*prompt, *output]])
    for processor in _processors(parameters):
        scores_1V = processor(ids_1T, scores_1V)
    return scores_1V[0].double().softmax(dim=-1)


def _processors(parameters):
    """The warpers whose parameter does something, in the order in which transformers applies them."""
    if parameters.logit_bias:
        yield generation.SequenceBiasLogitsProcessor(
            {(token,): bias for token, bias in parameters.logit_bias}
        )
    if parameters.repetition_penalty != 1:
        yield generation.RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty)
    if parameters.temperature not in (0, 1):
        yield generation.TemperatureLogitsWarper(parameters.temperature)
    if parameters.top_k:
        yield generation.TopKLogitsWarper(parameters.top_k)
    if parameters.top_p < 1:
        yield generation.TopPLogitsWarper(parameters.top_p)
    if parameters.min_p:
        yield generation.MinPLogitsWarper(parameters.min_p)
