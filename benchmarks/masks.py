"""Masks of one tenant's texts in the steps of another tenant; baseline: all texts are of one tenant.

python -m benchmarks.masks [--texts 32] [--steps 120] [--vocabulary 128000] [--expression REGEX]

Prints the CPU time of the masks of a step. The vocabulary is made of syllables, with the bytes, words,
numbers and characters that published ones have; texts get random tokens among those that are allowed. No
model computes.
"""

import argparse
import random
from statistics import mean, quantiles

import numpy as np
import torch

from benchmarks.commands import at_least, positive
from moe_worker.sampling.guides import Guide, Guides
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.scheduler.core import Scheduler
from moe_worker.scheduler.plan import Arrival, Limits, Plan

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
STEP_S = 0.01
GUEST = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=positive, default=32)
    parser.add_argument("--steps", type=at_least(12), default=120)
    parser.add_argument("--vocabulary", type=at_least(257), default=128_000)
    parser.add_argument("--expression", default="[a-zA-Z0-9 ]{1,2000}")
    arguments = parser.parse_args()
    vocabulary = Vocabulary(arguments.vocabulary)
    guides = Guides(vocabulary, arguments.vocabulary, [arguments.vocabulary - 1], threads=1)
    guides.prepare()
    for title, tenant in (("all of one tenant", "slow"), ("next to another tenant", "guest")):
        run = Run(guides, vocabulary, OutputFormat("regex", arguments.expression), arguments.texts, tenant)
        for _ in range(arguments.steps):
            run.step()
        milliseconds = [1e3 * seconds for seconds in run.seconds[arguments.steps // 6 :]]
        print(
            f"{title:22}: masks take {mean(milliseconds):.2f} ms of CPU time a step "
            f"(90th percentile {quantiles(milliseconds, n=10)[-1]:.2f} ms), and the stream without a format "
            f"is in {run.guest} of {arguments.steps} steps"
        )


class Vocabulary:
    """Tokens as in published vocabularies; the last one ends a text."""

    def __init__(self, size: int) -> None:
        self._tokens = [bytes([byte]) for byte in range(256)]
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        chance = random.Random(0)
        weights = [1 / rank for rank in range(1, len(LETTERS) + 1)]
        syllables = ["".join(chance.choices(LETTERS, weights, k=chance.randint(2, 3))) for _ in range(600)]
        while len(self._tokens) < size - 1:
            token = _token(chance, syllables).encode(errors="ignore")
            if token and token not in self._ids:
                self._ids[token] = len(self._tokens)
                self._tokens.append(token)
        self._tokens.append(b"")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002 - as a tokenizer
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return self._tokens[token]


def _token(chance: random.Random, syllables: list[str]) -> str:
    word, kind = "".join(chance.choices(syllables, k=chance.randint(1, 4))), chance.random()
    if kind < 0.5:
        return " " + word
    if kind < 0.6:
        return word.capitalize()
    if kind < 0.63:
        return str(chance.randint(0, 999))
    return chr(chance.randint(0x80, 0x9FFF)) + chr(chance.randint(0x80, 0x9FFF)) if kind < 0.7 else word


class Run:
    """`texts` streams with a format and one without, of `tenant`. seconds: of masks, by step."""

    def __init__(
        self, guides: Guides, vocabulary: Vocabulary, wanted: OutputFormat, texts: int, tenant: str
    ) -> None:
        self._scheduler = Scheduler(Limits(sequences=2 * texts, waiting=texts, pages=10_000, ahead=False))
        self._guides, self._vocabulary, self._chance = guides, vocabulary, random.Random(1)
        self._texts: dict[int, Guide] = {}
        self._now = 0.0
        self.seconds: list[float] = []
        self.guest = 0
        for size in (texts, 3):  # steps of several sizes tell that a token costs nothing
            for number in range(size):
                self._scheduler.submit(Arrival(number, [1], 5, self._now))
            while not self._scheduler.idle:
                self._complete(self._plan())
        for number in range(texts):
            self._texts[number] = guides.open(wanted, (), str(number // 8))
            self._scheduler.submit(Arrival(number, [1], 10_000, self._now, tenant="slow", guided=True))
        self._scheduler.submit(Arrival(GUEST, [1], 10_000, self._now, tenant=tenant))

    def step(self) -> None:
        plan = self._plan()
        chunks = plan.step.chunks if plan.step is not None else []
        self._mask([chunk.id for chunk in chunks if chunk.id in self._texts])
        self.guest += GUEST in {chunk.id for chunk in chunks}
        self._complete(plan)

    def _mask(self, names: list[int]) -> None:
        guided = [(row, self._texts[name]) for row, name in enumerate(names)]
        took = {}
        if guided:
            bits = self._guides.masks(guided, torch.device("cpu")).bits_MB.numpy()
            took = {name: self._texts[name].take_seconds() for name in names}
            for row, guide in guided:
                allowed = np.unpackbits(bits[row], bitorder="little").nonzero()[0]
                token = int(self._chance.choice(allowed))
                guide.take(token, self._vocabulary.token_bytes(token))
        self.seconds.append(sum(took.values()))
        self._scheduler.note_masks(took)

    def _plan(self) -> Plan:
        plan = self._scheduler.plan(self._now)
        self._now += STEP_S
        return plan

    def _complete(self, plan: Plan) -> None:
        if plan.step is not None:
            sampled = sum(chunk.samples for chunk in plan.step.chunks)
            self._scheduler.complete(plan.step, [1] * sampled, self._now)


if __name__ == "__main__":
    main()
