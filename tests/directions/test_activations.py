"""Means that come in batches, and batches of prompts: without a model."""

from __future__ import annotations

import pytest
import torch

from exporter.directions.activations import AUTO_TOKENS, RunningMean, by_length, last_token

CPU = torch.device("cpu")


def test_a_mean_of_nothing_counts_nothing_and_is_merged_as_nothing():
    mean, nothing = RunningMean(), RunningMean()
    assert nothing.count == 0
    mean.update(torch.ones(2, 3, 4))
    mean.merge(nothing)
    assert mean.count == 2
    assert torch.equal(mean.mean, torch.ones(3, 4, dtype=torch.float64))


def test_prompts_of_one_length_keep_their_order_and_are_not_compared():
    items = [{"b": 1}, {"a": 2}, {"c": 3}]
    assert by_length(items, [2, 2, 1], None, CPU) == [[{"c": 3}, {"b": 1}, {"a": 2}]]


def test_every_prompt_needs_a_length():
    with pytest.raises(ValueError, match="longer"):
        by_length([1, 2], [5], None, CPU)


@pytest.mark.parametrize(("device", "budget"), [("cpu", "cpu"), ("cuda", "cuda"), ("xpu", "cpu")])
def test_a_batch_fills_its_device_s_budget_and_no_more(device, budget):
    length = AUTO_TOKENS[budget] // 4 + 1  # four are too many
    assert [len(b) for b in by_length(range(7), [length] * 7, None, torch.device(device))] == [3, 3, 1]


def test_the_last_token_is_looked_for_where_the_mask_is():
    assert last_token(torch.ones(2, 3, dtype=torch.int64, device="meta")).device.type == "meta"
