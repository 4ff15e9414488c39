from __future__ import annotations

import pytest

from exporter.evaluation.intervals import PairedDifference, Share, paired, share


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_values(hits, n, low, high):
    """81/263, 15/148, 0/20 and 1/29 are Newcombe's examples (Statistics in Medicine 17, 857-872, 1998, table I)."""
    assert Share(hits, n).ci95 == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_what_is_counted():
    assert share([True, False, True]) == Share(hits=2, n=3)
    with pytest.raises(ValueError, match="zip"):
        paired([True, False], [True])


def test_nothing_to_count():
    assert share([]) is None
    assert paired([], []) is None


def test_paired_differences():
    same = paired([True, False, True], [True, False, True])
    assert same.difference == 0
    assert same.p == 1
    low, high = same.ci95
    assert low < 0 < high
    all_gained = PairedDifference(gained=0, lost=450, both=0, n=450)
    assert all_gained.difference == -1
    assert all_gained.ci95[1] < -0.98
    assert all_gained.p < 1e-100


def test_newcombe_interval_against_his_example():
    """Newcombe 1998, Statistics in Medicine 17, 2635-2650, table III: (36, 12, 2, 0) of 50 gives 0.0569 to 0.3404."""
    found = PairedDifference(gained=12, lost=2, both=36, n=50)
    assert found.difference == pytest.approx(0.2)
    assert found.ci95 == (pytest.approx(0.0569, abs=2e-3), pytest.approx(0.3404, abs=2e-3))


@pytest.mark.parametrize(
    ("both", "gained", "lost", "neither", "low", "high"),
    [
        (20, 12, 2, 16, 0.0562, 0.3292),  # the product of the correlation is positive, less half of n for continuity
        (14, 5, 0, 22, 0.0115, 0.2265),  # counts of Altman et al., Statistics with confidence (2000), table 6.2
        (3, 1, 3, 2, -0.5548, 0.2033),  # positive, and not beyond half of n: no correlation
    ],
)
def test_newcombe_interval_of_answers_that_go_together(both, gained, lost, neither, low, high):
    """Worked out apart from the formula of Newcombe's method 10, with Wilson's limits as the roots of their equation."""
    found = PairedDifference(gained=gained, lost=lost, both=both, n=both + gained + lost + neither)
    assert found.ci95 == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_which_answers_are_gained_and_which_lost():
    found = paired([True] * 5 + [False] * 4, [True] * 2 + [False] * 6 + [True])
    assert found == PairedDifference(gained=3, lost=1, both=2, n=9)


def test_mcnemar_is_exact():
    assert PairedDifference(gained=1, lost=9, both=0, n=20).p == pytest.approx(2 * (1 + 10) / 2**10)
    assert PairedDifference(gained=5, lost=5, both=0, n=20).p == 1
