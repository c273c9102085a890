"""A teacher's most likely tokens for every position of the training text, computed once and cached on disk.

The teacher reads windows that overlap by half, and the output for the second half is kept. So every position
except those at the very beginning has at least half a window of context, wherever a student's windows begin.

Legend: N tokens of the stream, C tokens kept per position, B sequences, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moe_worker.compress.distillation import TeacherView, as_float16, teacher_fits, top_logprobs
from moe_worker.config import read_model_config
from moe_worker.errors import DataError, SettingsError
from moe_worker.files import digest, locked, replacing, reserve, write_text
from moe_worker.kernels.transfer import to_device
from moe_worker.progress import bar
from moe_worker.train import data
from moe_worker.train.corpus import Corpus
from moe_worker.train.model import TrainingModel
from moe_worker.train.names import load_checkpoint_tensors
from moe_worker.train.settings import TrainSettings
from moe_worker.train.state import read_tensors

# Windows that the teacher reads together.
BATCH = 16


@dataclass(frozen=True)
class Teacher:
    """ids_NC uint16 and logprobs_NC float16 are on disk; `model` runs if hidden states are in the loss."""

    ids_NC: NDArray[np.uint16]
    logprobs_NC: NDArray[np.float16]
    model: TrainingModel | None
    settings: TrainSettings

    def view(self, places_BT: NDArray[np.int64], inputs_BT: torch.Tensor) -> TeacherView:
        """The output of the teacher at these positions of the stream."""
        device, hidden = inputs_BT.device, None
        if self.model is not None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                hidden = self.model.hidden(inputs_BT)
        return TeacherView(
            to_device(torch.from_numpy(self.ids_NC[places_BT].astype(np.int32)), device).long(),
            to_device(torch.from_numpy(self.logprobs_NC[places_BT]), device).float(),
            self.settings.teacher_share,
            hidden,
            self.settings.hidden_share,
        )


def prepare_teacher(settings: TrainSettings, corpus: Corpus, device: torch.device) -> Teacher | None:
    """Opens the teacher's cache, and computes what is missing; None without a teacher.

    Raises WorkerError if the teacher cannot be read or has another tokenizer.
    """
    if settings.teacher is None:
        return None
    check_teacher(settings.teacher, corpus.tokenizer, _wanted_size(settings))
    model = _load(settings.teacher, device)
    stem = _stem(settings, corpus)
    with locked(stem.with_suffix(".lock")):
        cache = _Cache.open(stem, settings, corpus)
        cache.fill(model, corpus, device)
    return Teacher(cache.ids_NC, cache.logprobs_NC, model if settings.hidden_share else None, settings)


def check_teacher(teacher: Path, tokenizer: Tokenizer, hidden_size: int | None) -> None:
    """Raises WorkerError where it cannot be read, or cannot teach a student with this tokenizer.

    Args:
        teacher: its checkpoint directory.
        tokenizer: the student's.
        hidden_size: the student's, where it learns from the teacher's hidden states.
    """
    theirs = data.read_tokenizer(teacher / "tokenizer.json").get_vocab()
    if reason := teacher_fits(tokenizer.get_vocab(), theirs):
        raise DataError(f"{teacher} cannot teach: {reason}")
    config = read_model_config(teacher / "config.json")
    if hidden_size not in (None, config.hidden_size):
        raise SettingsError(
            f"hidden_share needs a teacher with the student's hidden_size, {hidden_size}; {teacher} has "
            f"{config.hidden_size}: set hidden_share to 0"
        )


def _wanted_size(settings: TrainSettings) -> int | None:
    return read_model_config(settings.config).hidden_size if settings.hidden_share else None


def _load(teacher: Path, device: torch.device) -> TrainingModel:
    config = read_model_config(teacher / "config.json")
    model = TrainingModel(config, dropout=0.0).to(device).eval().requires_grad_(requires_grad=False)
    load_checkpoint_tensors(model, read_tensors(teacher / "model.safetensors"))
    return model


def _stem(settings: TrainSettings, corpus: Corpus) -> Path:
    """Path in the shared folder, with a name that depends on the teacher, the text and the window."""
    if settings.teacher is None or corpus.tokenizer.get_vocab_size() > 2**16:
        raise SettingsError("the teacher's cache holds token ids of 16 bits; use a smaller vocabulary")
    teacher = digest(settings.teacher / "model.safetensors")
    key = f"{teacher} {corpus.digest} {settings.window} {settings.teacher_top}"
    return settings.shared / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class _Cache:
    ids_NC: NDArray[np.uint16]
    logprobs_NC: NDArray[np.float16]
    progress: Path
    window: int

    @classmethod
    def open(cls, stem: Path, settings: TrainSettings, corpus: Corpus) -> _Cache:
        """The files that begin with `stem`, created if missing."""
        shape = (len(corpus.stream_N), settings.teacher_top)
        ids, logprobs = stem.with_suffix(".ids.npy"), stem.with_suffix(".logprobs.npy")
        progress = stem.with_suffix(".json")
        if not (ids.exists() and logprobs.exists() and progress.exists()):
            for path, dtype in ((ids, np.uint16), (logprobs, np.float16)):
                with replacing(path) as beside:
                    np.lib.format.open_memmap(beside, "w+", dtype, shape)
                    reserve(beside)
            write_text(progress, json.dumps({"places": 0}))
        opened = [np.lib.format.open_memmap(path, "r+") for path in (ids, logprobs)]
        return cls(opened[0], opened[1], progress, settings.window)

    def fill(self, model: TrainingModel, corpus: Corpus, device: torch.device) -> None:
        """Continues an interrupted computation; positions recorded as done are on disk."""
        done, total = int(json.loads(self.progress.read_text())["places"]), len(corpus.stream_N)
        stream_N = torch.from_numpy(corpus.stream_N)
        with bar(total=total, initial=done, desc="teacher", unit="token", unit_scale=True) as shown:
            for number, (windows_BT, first) in enumerate(self._batches(stream_N, done)):
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                    logits_BTV = model.logits(windows_BT.long().to(device))
                done = self._store(logits_BTV, first, done)
                shown.update(done - shown.n)
                if number % 64 == 0 or done == total:
                    self._flush(done)

    def _batches(self, stream_N: torch.Tensor, done: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Windows that overlap by half, and the position of the first."""
        half, total = max(1, self.window // 2), len(stream_N)
        start = max(0, done - self.window + half)
        while done < total:
            count = max(1, min(BATCH, (total - start - self.window) // half + 1))
            pieces = [stream_N[start + i * half : start + i * half + self.window] for i in range(count)]
            yield torch.stack(pieces), start
            start += count * half
            done = min(total, start - half + self.window)

    def _store(self, logits_BTV: torch.Tensor, first: int, done: int) -> int:
        """Stores the output for positions that are not done; returns the first position that is not done."""
        half = max(1, self.window // 2)
        ids_BTC, logprobs_BTC = top_logprobs(logits_BTV, self.ids_NC.shape[1])
        ids, logprobs = ids_BTC.cpu().numpy(), as_float16(logprobs_BTC).cpu().numpy()
        for row in range(len(ids)):
            begin, end = first + row * half, first + row * half + ids.shape[1]
            fresh = slice(done - begin, None)
            self.ids_NC[done:end], self.logprobs_NC[done:end] = ids[row][fresh], logprobs[row][fresh]
            done = end
        return done

    def _flush(self, done: int) -> None:
        for array in (self.ids_NC, self.logprobs_NC):
            if isinstance(array, np.memmap):
                array.flush()
        write_text(self.progress, json.dumps({"places": done}))
