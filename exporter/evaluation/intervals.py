"""Shares with intervals, and paired differences of shares on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Share:
    """`hits` of `n`, with its Wilson 95 % interval (Wilson 1927)."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        square = _Z * _Z / self.n
        centre = (self.value + square / 2) / (1 + square)
        half = _Z / (1 + square) * math.sqrt(self.value * (1 - self.value) / self.n + square / (4 * self.n))
        return max(0.0, centre - half), min(1.0, centre + half)


def share(outcomes: Sequence[bool]) -> Share | None:
    """None where there is nothing to count."""
    return Share(sum(outcomes), len(outcomes)) if outcomes else None


@dataclass(frozen=True)
class PairedDifference:
    """Share under one condition minus share under another on the same `n` questions.

    `gained`: hits only under the first, `lost`: only under the second. The interval is Newcombe's for paired proportions
    (Newcombe 1998, method 10); `p` is the exact two-sided McNemar test's.
    """

    gained: int
    lost: int
    both: int
    n: int

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        first, second = Share(self.both + self.gained, self.n), Share(self.both + self.lost, self.n)
        neither = self.n - self.both - self.gained - self.lost
        spread = math.sqrt(first.hits * (self.n - first.hits) * second.hits * (self.n - second.hits))
        product: float = self.both * neither - self.gained * self.lost
        if product > self.n / 2:
            product -= self.n / 2
        elif product >= 0:
            product = 0
        correlation = product / spread if spread else 0.0
        low = self._half(first.value - first.ci95[0], second.ci95[1] - second.value, correlation)
        high = self._half(first.ci95[1] - first.value, second.value - second.ci95[0], correlation)
        return max(-1.0, self.difference - low), min(1.0, self.difference + high)

    @staticmethod
    def _half(one: float, other: float, correlation: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    @property
    def p(self) -> float:
        discordant = self.gained + self.lost
        fewer = min(self.gained, self.lost)
        tail = sum(math.comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
        return min(1.0, 2 * tail)


def paired(first: Sequence[bool], second: Sequence[bool]) -> PairedDifference | None:
    """First minus second, question by question; None where there is nothing to compare."""
    if not first:
        return None
    pairs = list(zip(first, second, strict=True))
    count = {pair: pairs.count(pair) for pair in ((True, False), (False, True), (True, True))}
    return PairedDifference(count[True, False], count[False, True], count[True, True], len(pairs))
