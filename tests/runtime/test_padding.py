from __future__ import annotations

import pytest

from exporter.runtime.padding import left_padded


@pytest.mark.parametrize("prompts", [[[7, 8, 9], [7]], [[7], [8]], [(7,), ()]])
def test_prompts_end_in_the_same_column(prompts):
    ids, mask = left_padded(prompts, 0)
    assert {len(row) for row in (*ids, *mask)} == {max(map(len, prompts))}
    assert [[i for i, kept in zip(*row, strict=True) if kept] for row in zip(ids, mask, strict=True)] == [
        list(p) for p in prompts
    ]
    assert all(row == sorted(row) for row in mask)
    assert all(i == 0 for row, real in zip(ids, mask, strict=True) for i in row[: len(row) - sum(real)])
