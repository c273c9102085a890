"""The training loop: steps, scores, states, and at the end a Hugging Face checkpoint directory."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.optim import Optimizer
from tqdm import tqdm

from moe_worker.config import ModelConfig, read_model_config
from moe_worker.engine.loading import choose_device
from moe_worker.errors import DataError
from moe_worker.train import data
from moe_worker.train.checks import check_trainable
from moe_worker.train.export import write_checkpoint
from moe_worker.train.model import TrainingModel, load_checkpoint_tensors
from moe_worker.train.optimizer import Muon, learning_rate_factor
from moe_worker.train.plot import plot_metrics
from moe_worker.train.score import Score, Window, score_documents
from moe_worker.train.settings import TrainSettings
from moe_worker.train.state import load_state, read_tensors, save_state

_LOG_EVERY = 50  # steps; reading the loss waits for the device, which every step would slow it down


def train(settings: TrainSettings) -> Path:
    """Trains a model, or goes on with an interrupted run of the same settings, and returns its folder.

    Raises:
        WorkerError: settings, text or an earlier state are unusable; the sentence says which and why.
    """
    return _Run(settings).run()


@dataclass
class _Text:
    documents: list[str]
    tokens: list[Window]


class _Run:
    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.device = choose_device(settings.device)
        self.config: ModelConfig = read_model_config(settings.config)
        check_trainable(self.config, settings)
        settings.out.mkdir(parents=True, exist_ok=True)
        documents = data.read_documents(settings.data)
        self.tokenizer = self._tokenizer(documents)
        stream_N = data.join_documents(data.encode_documents(self.tokenizer, documents))
        self.text_digest = hashlib.sha256(stream_N.tobytes()).hexdigest()
        self.sampler = data.WindowSampler(
            torch.from_numpy(stream_N).to(self.device), settings.window, settings.batch, settings.seed
        )
        self.valid = self._valid()
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self.model = TrainingModel(self.config, settings.dropout).to(self.device)
        if settings.start_from is not None:
            load_checkpoint_tensors(self.model, read_tensors(settings.start_from / "model.safetensors"))
        self.loss = torch.compile(self.model) if self.device.type == "cuda" else self.model
        self.optimizers = _optimizers(self.model, settings)
        self.state_file = settings.out / "state.safetensors"
        self.metrics_file = settings.out / "metrics.jsonl"

    def run(self) -> Path:
        first = self._resume()
        started = time.monotonic()
        limit = self.settings.stop_after
        for step in self._steps(first):
            self._step(step)
            if self._due(step + 1, self.settings.checkpoint_every):
                self._save(step + 1)
            if limit is not None and time.monotonic() - started > limit and step + 1 < self.settings.steps:
                self._save(step + 1)
                return self.settings.out
        self._save(self.settings.steps)
        score = self._score()
        self._record(step=self.settings.steps, valid_bits_per_byte=score.bits_per_byte if score else None)
        write_checkpoint(self.settings.out, self.settings.config, self.model, self.tokenizer)
        plot_metrics(self.metrics_file, self.settings.out / "loss.png")
        return self.settings.out

    def _steps(self, first: int) -> Iterator[int]:
        """Yields steps behind a progress bar, and records what the finished ones showed."""
        tokens = self.settings.batch * self.settings.window
        last = time.monotonic()
        with tqdm(
            total=self.settings.steps, initial=first, unit="step", desc="train", mininterval=1.0
        ) as bar:
            for step in range(first, self.settings.steps):
                yield step
                bar.update()
                if self._due(step + 1, _LOG_EVERY):
                    now = time.monotonic()
                    figures = {
                        "loss": float(self.last_loss),
                        "tokens_per_second": tokens * _LOG_EVERY / (now - last),
                        "imbalance": self.last_imbalance,
                    }
                    last = now
                    bar.set_postfix({key: f"{value:,.4g}" for key, value in figures.items()})
                    self._record(step=step + 1, tokens=tokens * (step + 1), **figures)
                if self._due(step + 1, self.settings.evaluate_every) and (score := self._score()):
                    bar.write(f"step {step + 1}: {score.bits_per_byte:.4f} bits per byte on valid")
                    self._record(step=step + 1, valid_bits_per_byte=score.bits_per_byte)
                    last = time.monotonic()

    def _step(self, step: int) -> None:
        factor = learning_rate_factor(
            step, self.settings.steps, self.settings.warmup, self.settings.decay_share
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        inputs, targets = self.sampler.at(step)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss: torch.Tensor = self.loss(inputs, targets)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.last_loss = loss.detach()
        if self._due(step + 1, _LOG_EVERY):
            self.last_imbalance = self.model.imbalance()
        self.model.balance(self.settings.balance_speed * min(1.0, 2 * factor))

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 and step < self.settings.steps

    def _score(self) -> Score | None:
        """Scores the validation text with the weights as they are."""
        if self.valid is None:
            return None
        self.model.eval()
        score = score_documents(
            self.valid.documents, self.valid.tokens, self.settings.window, data.BOS_ID, self._nats
        )
        self.model.train()
        return score

    @torch.no_grad()
    def _nats(self, window: Window) -> float:
        ids = torch.from_numpy(window.astype(np.int64)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            return float(self.model(ids[None, :-1], ids[None, 1:])) * (len(window) - 1)

    def _valid(self) -> _Text | None:
        if self.settings.valid is None:
            return None
        documents = data.read_documents(self.settings.valid)
        return _Text(documents, data.encode_documents(self.tokenizer, documents))

    def _tokenizer(self, documents: list[str]) -> Tokenizer:
        """The tokenizer given, else the one of the run that is resumed, else a new one."""
        own, start = self.settings.out / "tokenizer.json", self.settings.start_from
        given = self.settings.tokenizer or (start / "tokenizer.json" if start else None)
        given = given or (own if own.exists() else None)
        if given is None:
            tokenizer = data.train_tokenizer(documents, self.config.vocab_size)
            tokenizer.save(str(own))
            return tokenizer
        tokenizer = data.read_tokenizer(given)
        if tokenizer.get_vocab_size() > self.config.vocab_size:
            raise DataError(
                f"{given}: has {tokenizer.get_vocab_size()} tokens, more than the vocab_size of "
                f"{self.config.vocab_size} in {self.settings.config}; make the two agree"
            )
        return tokenizer

    def _fingerprint(self) -> str:
        """Names the settings, the model's shape and the text that a resumed run must share."""
        free = {"out", "stop_after", "device", "data", "valid", "tokenizer", "config", "start_from"}
        free |= {"evaluate_every", "checkpoint_every"}
        fixed = {key: value for key, value in asdict(self.settings).items() if key not in free}
        model = json.loads(self.settings.config.read_text())
        return json.dumps({**fixed, "model": model, "text": self.text_digest}, sort_keys=True)

    def _resume(self) -> int:
        if not self.state_file.exists():
            self.metrics_file.unlink(missing_ok=True)
            return 0
        first = load_state(self.state_file, self.model, self.optimizers, self._fingerprint())
        lines = self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []
        # What the interrupted run recorded after its last state will be recorded again.
        kept = [line for line in lines if json.loads(line)["step"] <= first]
        self.metrics_file.write_text("".join(f"{line}\n" for line in kept))
        return first

    def _save(self, step: int) -> None:
        save_state(self.state_file, step, self.model, self.optimizers, self._fingerprint())

    def _record(self, **figures: float | None) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(figures) + "\n")


def _optimizers(model: TrainingModel, settings: TrainSettings) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, output head, routers and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = name.startswith("layers.") and parameter.dim() > 1 and "router" not in name
        (matrices if inside else others).append(parameter)
    muon = Muon(matrices, settings.learning_rate, weight_decay=settings.weight_decay)
    adamw = torch.optim.AdamW(
        others,
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=next(model.parameters()).is_cuda,
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]
