"""The divergence over the whole vocabulary, from both models' last hidden states and output heads.

Legend: `N` positions, `n` positions of a chunk, `D` width (each model its own), `V` vocabulary.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcache.losses import LogitLoss, Pair
from kdcache.losses.output_layer import first_ids
from kdcache.targets import inverse
from kdcache.targets.tensor import OutputHead


def exact_divergence(
    student_hidden: Tensor,
    student_head: OutputHead,
    teacher_hidden: Tensor,
    teacher_head: OutputHead,
    *,
    temperature: float,
    divergence: LogitLoss,
    num_ids: int,
    chunk: int,
) -> Tensor:
    """Return the divergence [N] in nats between both softmaxes over ids 0 to `num_ids` - 1: exact.

    Each chunk is checkpointed: its logits exist while it runs, forward and again backward, so memory does
    not grow with N * V. The student's product runs in the autocast dtype, else in that of its hidden
    states; the teacher's in the dtype of its output head, whatever the autocast; softmax in float32, or
    float64 where the product does. No gradient reaches the teacher. Deterministic.

    Args:
        student_hidden: [N, D_student], last hidden states.
        student_head: The student's output head; its dtype is that of the hidden states, or autocast is on.
        teacher_hidden: [N, D_teacher], last hidden states as captured.
        teacher_head: The teacher's output head.
        temperature: T, of both sides.
        divergence: From `kdcache.losses.divergence`.
        num_ids: Ids that are real tokens. Rows beyond them pad a vocabulary, differently in each model, and
            are left out of both softmaxes.
        chunk: Positions at a time.

    Raises:
        MismatchError: A head has fewer than `num_ids` rows.
        ValueError: The two sides differ in positions, or `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"a chunk has at least one position, not {chunk}")
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(f"{len(student_hidden)} positions of the student, {len(teacher_hidden)} of the teacher")
    b = inverse(temperature)
    student_head, teacher_head = first_ids(student_head, num_ids), first_ids(teacher_head, num_ids)

    def one_chunk(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(teacher.device.type, enabled=False):
            log_p = _log_softmax(teacher_head.logits(teacher.to(teacher_head.weight.dtype)), b)
        return divergence(Pair(log_p, _log_softmax(student_head.logits(student), b)))

    parts = [
        checkpoint(one_chunk, student, teacher, use_reentrant=False, preserve_rng_state=False)
        for student, teacher in zip(torch.split(student_hidden, chunk), torch.split(teacher_hidden, chunk), strict=True)
    ]
    return torch.cat(parts)


def _log_softmax(logits: Tensor, inverse_temperature: float) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.to(wide) * inverse_temperature, dim=1)
