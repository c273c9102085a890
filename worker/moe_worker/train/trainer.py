"""The training loop: steps, scores, states, and at the end a Hugging Face checkpoint directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_worker.config import ModelConfig, read_model_config
from moe_worker.config.directory import read_json
from moe_worker.engine.loading import choose_device
from moe_worker.files import digest, make_folder
from moe_worker.progress import bar, transient_bar
from moe_worker.train import data, metrics
from moe_worker.train.checks import check_trainable
from moe_worker.train.corpus import ScoredText, read_corpus
from moe_worker.train.export import write_checkpoint
from moe_worker.train.learner import Learner
from moe_worker.train.names import load_checkpoint_tensors
from moe_worker.train.plot import plot_metrics
from moe_worker.train.score import Score, score_documents
from moe_worker.train.settings import TrainSettings
from moe_worker.train.state import load_state, read_tensors, save_state
from moe_worker.train.teacher import prepare_teacher

_LOG_EVERY = 50  # steps; reading the loss waits for the device, which every step would slow it down
_SCORE_TOGETHER = 16  # windows; more fill a GPU no better
# An interrupted run may go on with others of these. Files may move: those that change what is learned are
# compared by their content.
_FREE = {
    "cache", "checkpoint_every", "config", "data", "device", "domains", "evaluate_every", "out", "start_from",
    "stop_after", "teacher", "tokenizer", "valid",
}  # fmt: skip


def train(settings: TrainSettings) -> Path:
    """Trains a model, or resumes an interrupted run with the same settings; returns its folder.

    Raises WorkerError if settings, text or an earlier state are unusable, and DivergedError if the loss is
    not finite; the last good state is kept then.
    """
    return TrainingRun(settings).run()


class TrainingRun:
    """A configured run: all settings and files are checked, and nothing is computed before `run`.

    final: the score on the validation text at the end, None before.
    """

    final: Score | None

    def __init__(self, settings: TrainSettings) -> None:
        """Raises WorkerError."""
        self.settings, self.final = settings, None
        self._started = time.monotonic()
        self.device = choose_device(settings.device)
        self.config: ModelConfig = read_model_config(settings.config)
        check_trainable(self.config, settings)
        make_folder(settings.out)
        self.corpus = read_corpus(settings, self.config.vocab_size)
        self.sampler = data.WindowSampler(
            torch.from_numpy(self.corpus.stream_N).to(self.device),
            settings.window,
            settings.batch,
            settings.seed,
        )
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self.learner = Learner(self.config, settings, self.device)
        if self.corpus.domains is not None and settings.domain_share > 0:
            self.learner.use_domains(self.corpus.domains)
        if settings.start_from is not None:
            tensors = read_tensors(settings.start_from / "model.safetensors")
            load_checkpoint_tensors(self.learner.model, tensors)
        random_state = torch.get_rng_state()
        self.teacher = prepare_teacher(settings, self.corpus, self.device)
        torch.set_rng_state(random_state)  # a teacher's own initial weights draw numbers too
        self.state_file = settings.out / "state.safetensors"
        self.metrics_file = settings.out / metrics.METRICS_FILE

    def run(self) -> Path:
        """Trains to the end, or until `stop_after`; returns the folder. Raises DivergedError."""
        first = self._resume()
        if self.settings.steps == 0:
            self.learner.prepare()
        for step in self._steps(first):
            self.learner.step(step, self.sampler, self.teacher, measure=self._due(step + 1, _LOG_EVERY))
            if self._due(step + 1, self.settings.checkpoint_every):
                self._save(step + 1)
            if self._is_late() and step + 1 < self.settings.steps:
                self._save(step + 1)
                return self.settings.out
        self._save(self.settings.steps)
        self.final = score = self.score(self.corpus.valid)
        self._record(step=self.settings.steps, valid_bits_per_byte=score.bits_per_byte if score else None)
        write_checkpoint(self.settings, self.learner, self.corpus.tokenizer)
        plot_metrics(self.metrics_file, self.settings.out / "loss.png")
        return self.settings.out

    def score(self, text: ScoredText | None) -> Score | None:
        """Scores a text with the current weights, masked and rounded if the run has reached that."""
        if text is None:
            return None
        window, nats = self.settings.window, self.learner.nats
        together = min(self.settings.batch, _SCORE_TOGETHER)
        total = sum(map(len, text.tokens))
        with transient_bar(total=total, desc="score", unit="token") as scored:
            return score_documents(
                text.documents, text.tokens, window, data.BOS_ID, nats, scored.update, together=together
            )

    def _steps(self, first: int) -> Iterator[int]:
        """Yields steps with a progress bar, and records the metrics of completed ones."""
        last = time.monotonic()
        with bar(total=self.settings.steps, initial=first, unit="step", desc="train") as shown:
            for step in range(first, self.settings.steps):
                yield step
                shown.update()
                if self._due(step + 1, _LOG_EVERY):
                    last = self._log(shown, step, last)
                if self._due(step + 1, self.settings.evaluate_every) and (
                    score := self.score(self.corpus.valid)
                ):
                    shown.write(f"step {step + 1}: {score.bits_per_byte:.4f} bits per byte on valid")
                    self._record(step=step + 1, valid_bits_per_byte=score.bits_per_byte)
                    last = time.monotonic()

    def _log(self, shown: tqdm[Any], step: int, last: float) -> float:
        """Shows and records the metrics of the last steps; returns the time of the record."""
        self.learner.check()
        now, tokens = time.monotonic(), self.settings.batch * self.settings.window
        figures = {
            "loss": float(self.learner.last_loss),
            "tokens_per_second": tokens * _LOG_EVERY / (now - last),
            "imbalance": self.learner.last_imbalance,
        }
        shown.set_postfix({key: f"{value:,.4g}" for key, value in figures.items()}, refresh=False)
        self._record(step=step + 1, tokens=tokens * (step + 1), **figures)
        return now

    def _is_late(self) -> bool:
        limit = self.settings.stop_after
        return limit is not None and time.monotonic() - self._started > limit

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 and step < self.settings.steps

    @cached_property
    def _fingerprint(self) -> str:
        """Identifies what a resumed run must share: settings, shape of the model, text, labels, teacher."""
        teacher, domains = self.settings.teacher, self.corpus.domains
        content = {
            "model": read_json(self.settings.config),
            "text": self.corpus.digest,
            "domains": domains.digest if domains is not None and self.settings.domain_share > 0 else None,
            "teacher": None if teacher is None else digest(teacher / "model.safetensors"),
        }
        fixed = {key: value for key, value in asdict(self.settings).items() if key not in _FREE}
        return json.dumps(fixed | content, sort_keys=True)

    def _resume(self) -> int:
        if not self.state_file.exists():
            self.metrics_file.unlink(missing_ok=True)
            return 0
        first = load_state(self.state_file, self.learner, self.learner.optimizers, self._fingerprint)
        self.learner.step_done = first
        # What the interrupted run recorded after its last state will be recorded again.
        kept = (row for row in metrics.read_rows(self.metrics_file) if row["step"] <= first)
        metrics.write_rows(self.metrics_file, kept)
        return first

    def _save(self, step: int) -> None:
        self.learner.check()
        save_state(self.state_file, step, self.learner, self.learner.optimizers, self._fingerprint)

    def _record(self, **figures: float | None) -> None:
        metrics.record(self.metrics_file, figures)
