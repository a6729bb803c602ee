"""The losses of a whole model's logits that transforms learn by.

    lm   mean next-token cross entropy                    (SpinQuant, AdaCodec as published)
    kd   mean over tokens of KL(p || q),                  (ours)
         p the unquantized model's law, q the quantized one's

kd cannot gain by adapting to the text. Its gradient, (q - p) / tokens, is taken together with its
value, a few rows at a time: no probability of all tokens is ever stored, and a vocabulary of 49,152
is passed over once instead of eight times.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK = 1 << 20  # logits at a time, so that what is made of them stays in the cache


def loss_of(logits: Tensor, ids: Tensor, teacher: Tensor | None) -> Tensor:
    """The loss, a float32 scalar, of logits [B, L, V].

    kd against the teacher's logits [B, L, V]; lm on ids [B, L] where there is no teacher.
    """
    if teacher is None:
        # what is predicted at each position but the last
        following = ids[:, 1:].flatten().to(logits.device)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), following)
    return _Divergence.apply(logits.flatten(0, 1).float(), teacher.flatten(0, 1).float())


class _Divergence(torch.autograd.Function):
    """Mean over rows of KL(softmax(teacher) || softmax(student)), both [T, V]; differentiable in
    the student, once."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.gradient = None
        if ctx.needs_input_grad[0]:
            ctx.gradient = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float64)
        rows = max(1, CHUNK // student.shape[-1])
        for i in range(0, len(student), rows):
            log_q = student[i : i + rows].log_softmax(-1)
            log_p = teacher[i : i + rows].log_softmax(-1)
            p = log_p.exp()
            # in place from here on: log_p and log_q are not needed again
            total += log_p.sub_(log_q).mul_(p).sum(dtype=torch.float64)
            if ctx.gradient is not None:
                torch.sub(log_q.exp_(), p, out=ctx.gradient[i : i + rows]).div_(len(student))
        return (total / len(student)).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        gradient = ctx.gradient
        ctx.gradient = None  # given away: it is as large as the logits
        return gradient.mul_(upstream), None
