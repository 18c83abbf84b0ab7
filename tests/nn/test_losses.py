from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from raycon.nn import losses


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_infonce_by_hand() -> None:
    query, key, queue = unit(3, 5), unit(3, 5, seed=1), unit(7, 5, seed=2)
    logits = losses.queue_logits(query, key, queue, 0.3)
    expected = 0.0
    for i in range(3):
        positive = math.exp(float(query[i] @ key[i]) / 0.3)
        negatives = sum(math.exp(float(query[i] @ n) / 0.3) for n in queue)
        expected -= math.log(positive / (positive + negatives)) / 3
    assert float(losses.cross_entropy(logits, losses.first_column(logits))) == pytest.approx(expected, rel=1e-5)


def test_queue_logits_are_those_of_the_parts_put_together_and_so_is_their_gradient() -> None:
    query, key, queue, weight = unit(3, 5), unit(3, 5, seed=1), unit(7, 5, seed=2), torch.randn(3, 8)
    mine, theirs = query.clone().requires_grad_(), query.clone().requires_grad_()
    found = losses.queue_logits(mine, key, queue, 0.3)
    wanted = torch.cat([(theirs * key).sum(1, keepdim=True), theirs @ queue.T], 1) / 0.3
    assert torch.equal(found, wanted)
    for logits in (found, wanted):
        (logits * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_nothing_but_the_query_may_ask_for_a_gradient_of_queue_logits() -> None:
    query, key = unit(3, 5).requires_grad_(), unit(3, 5, seed=1).requires_grad_()
    with pytest.raises(AssertionError, match="detach keys"):
        losses.queue_logits(query, key, unit(7, 5, seed=2), 0.3).sum().backward()


def test_accuracy_of_the_first_column_is_that_of_any() -> None:
    nan = float("nan")
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [1.0, 1.0, 0.0], [nan, 1.0, 0.0], [2.0, 2.0, 2.0]])
    assert float(losses.first_accuracy(logits)) == pytest.approx(0.6)
    assert float(losses.accuracy(logits[:3], torch.tensor([0, 0, 0]))) == float(losses.first_accuracy(logits[:3]))
    assert float(losses.accuracy(logits[:3], torch.tensor([0, 1, 1]))) == pytest.approx(2 / 3)  # a tie: the first


def test_a_distribution_that_is_one_hot_equals_its_column() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 3, 8, 1, 1, 4])
    one_hot = F.one_hot(target, 9).float()
    torch.testing.assert_close(losses.cross_entropy(logits, one_hot), losses.cross_entropy(logits, target))


def test_an_excluded_candidate_changes_nothing() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.softmax(torch.randn(4, 5), 1)
    wider = torch.cat([logits, torch.full((4, 2), -torch.inf)], 1).requires_grad_()
    loss = losses.cross_entropy(wider, torch.cat([target, torch.zeros(4, 2)], 1))
    torch.testing.assert_close(loss.detach(), losses.cross_entropy(logits, target))
    loss.backward()
    assert wider.grad is not None
    assert torch.isfinite(wider.grad).all()


def test_samples_are_distinct_allowed_and_fresh() -> None:
    exclude = torch.tensor([3, 3, 40, 99])
    ids, valid = losses.sample_excluding(90, 120, exclude, 50, seed=7)
    assert valid.all()
    assert len(set(ids.tolist())) == 50
    assert not set(ids.tolist()) & {3, 40}
    assert int(ids.max()) < 90
    again, _ = losses.sample_excluding(90, 120, exclude, 50, seed=7)
    other, _ = losses.sample_excluding(90, 120, exclude, 50, seed=8)
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)


def test_samples_are_uniform_over_what_is_left() -> None:
    counts = torch.zeros(20)
    first = torch.zeros(20)
    for seed in range(4000):
        ids, _ = losses.sample_excluding(18, 20, torch.tensor([0, 5]), 4, seed)
        counts[ids] += 1
        first[ids[0]] += 1
    allowed = [i for i in range(18) if i not in (0, 5)]
    assert counts.sum() == counts[allowed].sum()
    expected = 4000 * 4 / 16
    chi2 = float(((counts[allowed] - expected) ** 2 / expected).sum())
    assert chi2 < 32.8  # 15 degrees of freedom, p = 0.005
    chi2 = float(((first[allowed] - 250) ** 2 / 250).sum())
    assert chi2 < 32.8


def test_fewer_are_left_than_asked_for() -> None:
    ids, valid = losses.sample_excluding(6, 10, torch.tensor([0, 1, 2]), 5, seed=0)
    assert sorted(ids[valid].tolist()) == [3, 4, 5]
    assert valid.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("block_rows", [1, 3, 4, 10])
def test_loss_in_blocks_of_rows_is_the_loss_of_the_whole(monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    torch.manual_seed(0)
    query, key, queue = (torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (10, 10, 21))
    whole = query.clone().requires_grad_()
    logits = torch.cat([(whole * key).sum(1, keepdim=True), whole @ queue.T], dim=1) / 0.2
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(10, dtype=torch.long))
    (3 * loss).backward()

    monkeypatch.setattr(losses, "BLOCK_CPU", block_rows * 22 + 5)
    blocks = query.clone().requires_grad_()
    found, right = losses.info_nce(blocks, key, queue, 0.2)
    (3 * found).backward()
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(blocks.grad, whole.grad)
    torch.testing.assert_close(right, (logits.argmax(1) == 0).float().mean())
    assert not right.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(losses.info_nce(query, key, queue, 0.2)[0], loss)


def test_blocks_of_rows_with_several_queries_and_a_soft_target(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    first, second, candidates = torch.randn(7, 4), torch.randn(7, 4), torch.randn(9, 4)
    target = torch.rand(7, 9).softmax(1)

    def part(rows: slice, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        one, two = (losses.cross_entropy(x @ candidates.T, target[rows]) for x in (a, b))
        return one + 2 * two, a.detach().mean()

    results = []
    for limit in (9 * 7, 9 * 2):
        monkeypatch.setattr(losses, "BLOCK_CPU", limit)
        a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
        loss, mean = losses.by_rows(part, (a, b), 9)
        loss.backward()
        results.append((loss.detach(), mean, a.grad, b.grad))
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, whole)


def test_own_key_and_weights_of_the_queue() -> None:
    weight = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.4, 0.4, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(losses.own_and(weight), expected)
    one_hot = torch.tensor([1.0, 0, 0, 0])
    torch.testing.assert_close(losses.own_and(weight, 0.25), 0.25 * expected + 0.75 * one_hot)
