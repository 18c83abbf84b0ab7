"""The cross-entropy with a distribution as target: value and gradient against autograd's own."""

from __future__ import annotations

import torch

from raycon.nn import losses


def test_value_and_gradient_are_autograd_s() -> None:
    """With excluded candidates (-inf), a row of zeros and a row that sums to less than 1."""
    generator = torch.Generator().manual_seed(0)
    logits = 9 * torch.randn(5, 7, generator=generator)
    target = torch.rand(5, 7, generator=generator).softmax(1)
    logits[0, 2:4], target[0, 2:4] = -torch.inf, 0
    target[1] = 0
    target[2] *= 0.3
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = losses.cross_entropy(ours, target)
    log_p = torch.log_softmax(theirs, dim=1)
    expected = -(target * torch.where(target == 0, 0.0, log_p)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad is not None
    assert (ours.grad[1] == 0).all()


def test_a_target_that_is_not_a_number_is_not_hidden() -> None:
    target = torch.full((2, 3), 1 / 3)
    target[1, 0] = torch.nan
    assert losses.cross_entropy(torch.zeros(2, 3), target).isnan()
