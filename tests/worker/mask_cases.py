"""What tests of masks share on a CPU and on a GPU: one schema, and what masks have to be."""

import json
import random

import torch

from moe_worker.sampling import guides
from moe_worker.sampling.output_format import OutputFormat

CPU = torch.device("cpu")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = OutputFormat("json_schema", json.dumps(PERSON))
ROWS = [[0, 1, 2], [2], [0, 2]]
"""Those of a batch of three that have a mask."""


def check_shared_lexer(engine, threads, device):
    """Texts that share a lexer get the masks of texts with a lexer of their own, whatever was written."""
    found, chance = engine._loaded, random.Random(0)
    masks = guides.Guides(found.tokenizer, found.config.vocab_size, found.config.eos_token_ids, threads)
    texts = [masks.open(SCHEMA, ()) for _ in range(12)]
    alone = [masks.open(SCHEMA, (), str(number)) for number in range(12)]
    for _ in range(20):
        shared_MV = masks.masks(list(enumerate(texts)), device).refused.cpu()
        for place, text in enumerate(alone):
            own = masks.masks([(place, text)], CPU)
            assert torch.equal(own.refused[0], shared_MV[place])
            token = chance.choice((~own.refused[0]).nonzero().flatten().tolist() or [0])
            ends = [each.take(token, found.tokenizer.token_bytes(token)) for each in (text, texts[place])]
            assert ends[0] == ends[1]


def check_masked_scores(rows, device):
    """Scores of refused tokens of `rows` become -inf in a copy; all others stay."""
    vocab_size = 70  # three words, of which the last has bits for no token
    chance = torch.Generator().manual_seed(0)
    scores_BV = torch.randn(3, vocab_size, generator=chance)
    bits_MB = torch.randint(256, (len(rows), 12), dtype=torch.uint8, generator=chance)
    expected_BV = scores_BV.clone()
    for place, row in enumerate(rows):
        for token in range(vocab_size):
            if not int(bits_MB[place, token // 8]) >> token % 8 & 1:
                expected_BV[row, token] = -torch.inf
    given_BV = scores_BV.to(device)
    allowed = guides.Allowed(rows, bits_MB.to(device), vocab_size)
    assert torch.equal(allowed.masked(given_BV).cpu(), expected_BV)
    assert torch.equal(given_BV.cpu(), scores_BV)
