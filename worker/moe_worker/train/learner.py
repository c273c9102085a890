"""A model in training: its steps, and its score with the current weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from moe_worker.compress.distillation import TeacherView
from moe_worker.config import ModelConfig
from moe_worker.errors import DivergedError
from moe_worker.train.compression import Compression
from moe_worker.train.corpus import Domains
from moe_worker.train.data import WindowSampler
from moe_worker.train.model import TrainingModel
from moe_worker.train.optimizer import learning_rate_factor, make_optimizers
from moe_worker.train.score import Window
from moe_worker.train.settings import TrainSettings
from moe_worker.train.specialise import cut_at, groups_of_domains
from moe_worker.train.teacher import Teacher


class Learner(nn.Module):
    """Model, optimizers and compression. Its state as a module is complete for resuming a run."""

    def __init__(self, config: ModelConfig, settings: TrainSettings, device: torch.device) -> None:
        super().__init__()
        self.settings, self.device, self.step_done = settings, device, 0
        self.model = TrainingModel(config, settings.dropout, settings.sequence_balance).to(device)
        self.model.specialise(settings.expert_cost, settings.domain_share)
        self._hint: tuple[Tensor, Tensor] | None = None
        self.compression = Compression(self.model, settings)
        self.optimizers = make_optimizers(
            list(self.model.named_parameters()),
            list(self.compression.parameters()),
            settings.optimizer,
            settings.learning_rate,
            settings.weight_decay,
        )
        if device.type == "cuda":
            self.model.compile_parts()
        self._first_bad = torch.tensor(-1, device=device)
        self.last_loss, self.last_imbalance = torch.zeros(()), 1.0

    def use_domains(self, domains: Domains) -> None:
        """Hints at the domains of tokens from now on: each is led to groups of the routers' first level."""
        routing = self.model.config.moe.routing
        groups, keep = routing.groups, routing.levels[0].keep if routing.levels else 1
        sizes = np.bincount(domains.tokens_N, minlength=len(domains.names)).tolist()
        led_NG = torch.zeros(len(sizes), groups, dtype=torch.bool)
        for domain, own in enumerate(groups_of_domains(sizes, groups, keep)):
            led_NG[domain, list(own)] = True
        self._hint = led_NG.to(self.device), torch.from_numpy(domains.tokens_N).to(self.device)

    def step(self, step: int, sampler: WindowSampler, teacher: Teacher | None, measure: bool) -> None:
        """Computes step `step`, counted from 0; `measure` waits for the load of the experts."""
        factor = learning_rate_factor(
            step, self.settings.steps, self.settings.warmup, self.settings.decay_share
        )
        self._set_rate(factor)
        self.model.train()
        self.model.cut(cut_at(step, self.settings.steps, self.settings.mass_after))
        self.compression.update(step, self._weights())
        self.last_loss = self._loss(step, sampler, teacher)
        bad = (self._first_bad < 0) & ~self.last_loss.isfinite()
        self._first_bad = torch.where(bad, step, self._first_bad)
        self._descend(step)
        if measure:
            self.last_imbalance = self.model.imbalance()
        if self.settings.balance == "coefficient":
            self.model.balance_by_coefficient(self.settings.balance_strength)
        else:
            self.model.balance(self.settings.balance_speed * min(1.0, 2 * factor))
        self.step_done = step + 1

    def prepare(self) -> None:
        """Sets masks and ranges for a run without steps, which compresses the weights unchanged."""
        self.compression.update(0, self._weights())

    def check(self) -> None:
        """Raises DivergedError if a loss since the last check was not finite."""
        if int(self._first_bad) >= 0:
            raise DivergedError(
                f"the loss at step {int(self._first_bad) + 1} is not a finite number; the last good state is "
                f"kept in {self.settings.out / 'state.safetensors'}: train with a lower --learning-rate or a "
                "smaller --clip-norm, into another --out"
            )

    def effective(self) -> dict[str, Tensor]:
        """The weights that the model computes with now, if they differ from its own."""
        return self.compression.effective(self.step_done, self._weights())

    @torch.no_grad()
    def nats(self, windows: Sequence[Window]) -> float:
        """Summed negative log-likelihood of the tokens of windows after their first, with the current
        weights.

        Nothing is compiled for this: lengths differ, and scoring a text takes a second.
        """
        inputs, targets = padded(windows)
        self.model.eval()
        self.model.round_activations(self.compression.rounds(self.step_done))
        with self._autocast(), torch.compiler.set_stance("force_eager"):
            mean = self._call(self.effective(), inputs.to(self.device), targets.to(self.device), None)
        return float(mean) * int((targets >= 0).sum())

    def _loss(self, step: int, sampler: WindowSampler, teacher: Teacher | None) -> Tensor:
        """Backpropagates and returns the loss."""
        inputs, targets = sampler.at(step)
        view = None if teacher is None else teacher.view(sampler.places(step), inputs)
        if self._hint is not None:
            led_NG, domains_N = self._hint
            places_BT = torch.from_numpy(sampler.places(step)).to(self.device)
            self.model.hint(led_NG, domains_N[places_BT].long())
        self.model.round_activations(self.compression.rounds(step))
        weights = self.compression.effective(step, self._weights())
        with self._autocast():
            loss = self._call(weights, inputs, targets, view)
        loss.backward()
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        half = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _descend(self, step: int) -> None:
        if self.settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        sparsifier = self.compression.sparsifier
        if sparsifier is not None and sparsifier.needs_gradients(step):
            gradients = {name: p.grad for name, p in self._weights().items() if p.grad is not None}
            sparsifier.observe(self._weights(), gradients)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _call(
        self, weights: dict[str, Tensor], inputs: Tensor, targets: Tensor, teacher: TeacherView | None
    ) -> Tensor:
        """Calls the model with other weights; a tied head may differ from the embedding."""
        loss: Tensor = torch.func.functional_call(
            self.model, weights, (inputs, targets, teacher), tie_weights=False
        )
        return loss

    def _weights(self) -> dict[str, Tensor]:
        """Weights by name; a tied head also has its own name."""
        return {**dict(self.model.named_parameters()), "lm_head.weight": self.model.lm_head.weight}

    def _set_rate(self, factor: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor


def padded(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [B, T]; short windows are padded with targets of -1, which do not count."""
    longest = max(map(len, windows)) - 1
    inputs, targets = (np.full((len(windows), longest), fill, np.int64) for fill in (0, -1))
    for row, window in enumerate(windows):
        inputs[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)
