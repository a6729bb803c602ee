"""The losses that transforms learn by: the fused divergence against torch's own and against its
definition."""

import torch

from harness.transforms import losses
from harness.transforms.losses import loss_of


def logits(seed: int, tokens: int = 7, vocabulary: int = 300) -> torch.Tensor:
    return 3 * torch.randn(1, tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_and_its_gradient_are_those_of_torch():
    student, teacher = (
        logits(0, vocabulary=losses.CHUNK // 3).requires_grad_(),
        logits(1, vocabulary=losses.CHUNK // 3),
    )
    rows, law = student.log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    expected = torch.nn.functional.kl_div(rows, law, log_target=True, reduction="batchmean")
    (wanted,) = torch.autograd.grad(expected / 4, student)
    found = loss_of(student, None, teacher)
    (found / 4).backward()
    assert torch.allclose(found, expected, rtol=1e-6)
    assert float((student.grad - wanted).norm()) < 1e-6 * float(wanted.norm())


def test_the_divergence_is_zero_at_the_teacher_and_nowhere_below():
    teacher = logits(2)
    own = teacher.clone().requires_grad_()
    at_teacher = loss_of(own, None, teacher + 5)  # a shift of logits is the same law
    at_teacher.backward()
    assert abs(float(at_teacher.detach())) < 1e-6
    assert float(own.grad.abs().max()) < 1e-7
    assert all(float(loss_of(logits(seed), None, teacher)) > 0.1 for seed in range(3, 9))


def test_next_token_loss_of_even_logits_is_the_log_of_the_vocabulary():
    ids = torch.arange(7)[None]
    assert torch.allclose(loss_of(torch.zeros(1, 7, 300), ids, None), torch.tensor(300.0).log())
