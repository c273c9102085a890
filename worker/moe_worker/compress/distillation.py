"""A student's loss against a teacher: its most likely tokens, and its last hidden states.

Legend: B sequences, T tokens, V vocabulary, C tokens that the teacher's cache holds for a position, D hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor

SMALLEST = 1e-6  # a probability: the logarithm of what is left besides the top ones must be finite


@dataclass(frozen=True)
class TeacherView:
    """Output of a teacher for a batch.

    ids_BTC: its most likely next tokens, int64; logprobs_BTC: their log-probabilities, float32. share: weight
    of the teacher in the loss; the text has the rest. hidden_BTD: its last hidden states, or None;
    hidden_share: their weight, added to the loss.
    """

    ids_BTC: Tensor
    logprobs_BTC: Tensor
    share: float
    hidden_BTD: Tensor | None = None
    hidden_share: float = 0.0


def distilled_loss(loss: Tensor, logits_BTV: Tensor, hidden_BTD: Tensor, teacher: TeacherView) -> Tensor:
    """`loss` of the text mixed with the student's cross-entropy to the teacher (Hinton, arXiv 1503.02531)."""
    mixed = (1 - teacher.share) * loss + teacher.share * top_cross_entropy(
        logits_BTV, teacher.ids_BTC, teacher.logprobs_BTC
    )
    if teacher.hidden_BTD is not None:
        mixed = mixed + teacher.hidden_share * hidden_distance(hidden_BTD, teacher.hidden_BTD)
    return mixed


def top_cross_entropy(logits_BTV: Tensor, ids_BTC: Tensor, logprobs_BTC: Tensor) -> Tensor:
    """Mean of -sum p log q over the teacher's top tokens and "any other token"; nats, float32.

    It is smallest if the student gives each top token, and all others together, the teacher's probability.
    """
    logq_BTC = F.log_softmax(logits_BTV.float(), dim=-1).gather(-1, ids_BTC)
    p_BTC = logprobs_BTC.float().exp()
    rest_p = (1 - p_BTC.sum(dim=-1)).clamp(min=0)
    rest_q = (1 - logq_BTC.exp().sum(dim=-1)).clamp(min=SMALLEST)
    return -((p_BTC * logq_BTC).sum(dim=-1) + rest_p * rest_q.log()).mean()


def hidden_distance(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """Mean squared distance of normalised hidden states: their scale differs between models."""
    width = (student_BTD.shape[-1],)
    return F.mse_loss(F.rms_norm(student_BTD.float(), width), F.rms_norm(teacher_BTD.float(), width))


def top_logprobs(logits_BTV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most likely tokens [B, T, C] and their log-probabilities, float32."""
    top = F.log_softmax(logits_BTV.float(), dim=-1).topk(min(count, logits_BTV.shape[-1]), dim=-1)
    return top.indices, top.values


def teacher_fits(student: dict[str, int], teacher: dict[str, int]) -> str | None:
    """Why a teacher cannot teach a student, by their vocabularies (text of a token to its id); None if it
    can.
    """
    if student == teacher:
        return None
    differing = sorted(set(student.items()) ^ set(teacher.items()), key=lambda item: item[1])
    token, index = differing[0]
    return (
        f"its tokenizer has {len(teacher)} tokens, the student's {len(student)}, and they differ first in "
        f"token {index}, {token!r}; a teacher must share the student's tokenizer.json"
    )


def as_float16(logprobs: Tensor) -> Tensor:
    """Log-probabilities as the cache stores them: their error, 2^-11 of the value, is far below a nat."""
    return logprobs.clamp(min=torch.finfo(torch.float16).min).half()
