"""Sampling of one step; baseline: transformers' processors and torch.multinomial on the same logits.

python -m benchmarks.sampling [--device cuda] [--vocabulary 129280] [--batch 1 16 64 256] [--json]
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as processes

from benchmarks.commands import at_least, positive
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.sampling.sampler import Sampler

CASES = {
    "greedy": SamplingParameters(),
    "temperature": SamplingParameters(temperature=0.7),
    "top-k 50, top-p 0.9": SamplingParameters(temperature=0.7, top_k=50, top_p=0.9),
    "top-p 0.9": SamplingParameters(temperature=0.7, top_p=0.9),
    "min-p 0.05": SamplingParameters(temperature=0.7, min_p=0.05),
    "repetition 1.1": SamplingParameters(temperature=0.7, repetition_penalty=1.1),
    "20 log-probabilities": SamplingParameters(logprobs=20),
}
PROMPT = list(range(1, 129))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabulary", type=at_least(129), default=129_280)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=positive, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for row in rows(device, arguments.vocabulary, arguments.batch, arguments.repeats):
        line = "{what:42} ours {ours:9.3f} {unit}, base {peer:9.3f}, ratio {ratio:.2f}, host {host:.3f} ms"
        print(json.dumps(row) if arguments.json else line.format(**row), flush=True)


def rows(
    device: torch.device, vocabulary: int, sizes: list[int], repeats: int
) -> Iterator[dict[str, str | float]]:
    for size in sizes:
        logits = (torch.randn(size, vocabulary) * 3).to(device)
        if device.type == "cuda":
            logits = logits.bfloat16()
        for name, parameters in CASES.items():
            ours, host = measure(_ours(logits, parameters), device, repeats)
            peer, _ = measure(_peer(logits, parameters), device, repeats)
            yield {
                "what": f"sampling, B {size}, V {vocabulary}, {name}",
                "ours": round(ours, 4),
                "peer": round(peer, 4),
                "ratio": round(peer / ours, 2),
                "unit": "ms",
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "host": round(host, 4),
            }


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Milliseconds a call until the device is done, and until the host has issued it."""
    for _ in range(3):
        call()
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    host = time.perf_counter() - start
    _wait(device)
    return (time.perf_counter() - start) / repeats * 1e3, host / repeats * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ours(logits: Tensor, parameters: SamplingParameters) -> Callable[[], object]:
    names = range(logits.shape[0])
    sampler = Sampler(logits.shape[1], logits.device, ())
    for name in names:
        sampler.admit(name, parameters, name, PROMPT)
    return lambda: sampler.sample(logits, names)


def _peer(logits: Tensor, parameters: SamplingParameters) -> Callable[[], object]:
    """The work of transformers' `generate` after the model."""
    ids = torch.tensor(PROMPT, device=logits.device).expand(logits.shape[0], -1)
    processors: list[Any] = []
    if parameters.repetition_penalty != 1:
        processors.append(processes.RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty))
    if parameters.temperature:
        processors.append(processes.TemperatureLogitsWarper(parameters.temperature))
    if parameters.top_k:
        processors.append(processes.TopKLogitsWarper(parameters.top_k))
    if parameters.top_p < 1:
        processors.append(processes.TopPLogitsWarper(parameters.top_p))
    if parameters.min_p:
        processors.append(processes.MinPLogitsWarper(parameters.min_p))

    def call() -> object:
        scores = logits.float()
        for process in processors:
            scores = process(ids, scores)
        if parameters.logprobs:
            return scores.log_softmax(-1).topk(parameters.logprobs), scores.argmax(-1)
        if not parameters.temperature:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1)

    return call


if __name__ == "__main__":
    main()
