import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_worker.errors import InputError
from moe_worker.train.data import read_documents
from moe_worker.train.evaluate import score_checkpoint
from moe_worker.train.evaluate_cli import evaluate
from moe_worker.train.score import cut_windows, score_documents

EXAMPLE = Path(__file__).parents[2] / "examples/docs-moe"


@given(tokens=st.lists(st.integers(2, 99), max_size=50), context=st.integers(1, 12))
def test_windows_predict_every_token_once_behind_what_precedes_it(tokens, context):
    windows = list(cut_windows(np.array(tokens, np.int32), context, bos_id=0))
    assert [token for window in windows for token in window[1:]] == tokens
    assert all(2 <= len(window) <= context + 1 for window in windows)
    assert [window[0] for window in windows] == ([0, *tokens[context - 1 :: context]] if tokens else [])[
        : len(windows)
    ]


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary_a_token():
    documents = ["ab", "é"]
    score = score_documents(
        documents,
        [np.array([5, 6], np.int32), np.array([7, 8], np.int32)],
        context=1,
        bos_id=0,
        nats=lambda windows: sum(len(window) - 1 for window in windows) * math.log(256),
    )
    assert score.tokens == 4
    assert score.utf8_bytes == 4
    assert score.bits_per_byte == pytest.approx(8.0)


def test_the_score_of_the_example_is_what_transformers_computes(tmp_path):
    text = "git-log(1)\n\nNAME\n    git-log - Show commit logs\n" * 3
    path = tmp_path / "text.txt"
    path.write_text(text + "\0" + "A short one.")
    result = CliRunner().invoke(
        evaluate, [str(EXAMPLE), "--data", str(path), "--context", "32", "--device", "cpu", "--json"]
    )
    score = json.loads(result.stdout.splitlines()[-1])

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    bits = 0.0
    for document in (text, "A short one."):
        ids = torch.tensor(tokenizer(document)["input_ids"])
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            with torch.inference_mode():
                log_probabilities = model(window[None, :-1]).logits[0].log_softmax(-1)
            bits -= log_probabilities.gather(-1, window[1:, None]).sum().item() / math.log(2)
    expected = bits / len((text + "A short one.").encode())
    assert score["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert score["documents"] == 2


@pytest.mark.parametrize(
    ("text", "context", "sentence"),
    [
        ("text", 5000, "--context is 5000; the model allows 1024"),
        ("\n\n", None, "holds no text; give a file with at least one document"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_weights_are_read(tmp_path, text, context, sentence):
    path, model = tmp_path / "text.txt", shutil.copytree(EXAMPLE, tmp_path / "model")
    path.write_text(text)
    (model / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=sentence):
        score_checkpoint(model, path, context=context, device="cpu", dtype="float32")


def test_the_example_reads_unseen_documentation_well(tmp_path):
    """A dozen short documents of the corpus' test split; all of it takes minutes (see the model card)."""
    corpus = EXAMPLE.parents[2] / "shared/data/docs-corpus/test.txt.zst"
    if not corpus.exists():
        pytest.skip(f"needs the text corpus at {corpus}")
    documents = [document for document in read_documents(corpus) if 500 < len(document) < 1500][:12]
    path = tmp_path / "some.txt"
    path.write_text("\0".join(documents))
    score = score_checkpoint(EXAMPLE, path, context=None, device="cpu", dtype="float32")
    assert score.bits_per_byte < 1.9  # 2.9 for the best byte-level compressor of such short texts
