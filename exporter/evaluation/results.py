"""What an evaluation found, as values: `results.defences["shiftdc"].asr.ci95`. None, and a `Rate()`, mean: not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Interval = tuple[float, float]


@dataclass(frozen=True)
class Rate:
    """A share from 0 to 1 with its Wilson 95 % interval."""

    value: float | None = None
    ci95: Interval | None = None


@dataclass(frozen=True)
class CellFigures:
    """The replies to one cell: in attacks `asr` was counted, in benign cells `over_refusal` and `utility`."""

    n: int | None = None
    refused: Rate = Rate()
    asr: Rate = Rate()
    over_refusal: Rate = Rate()
    utility: Rate = Rate()

    @property
    def is_attack(self) -> bool:
        return self.asr.value is not None

    @property
    def failed(self) -> Rate:
        """Attacks that succeeded, or benign requests refused."""
        return self.asr if self.is_attack else self.over_refusal


@dataclass(frozen=True)
class GroupFigures:
    """The replies to a category, or about one kind of image."""

    n: int | None = None
    asr: Rate = Rate()
    over_refusal: Rate = Rate()


@dataclass(frozen=True)
class DefenceFigures:
    """What one defence did. Times are seconds a reply, `seconds` by stage; `cost_ratio` is to the time without defence."""

    n_harmful: int | None = None
    n_benign: int | None = None
    asr: Rate = Rate()
    over_refusal: Rate = Rate()
    utility: Rate = Rate()
    degenerate: float | None = None
    seconds_per_reply: float | None = None
    cost_ratio: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    by_cell: Mapping[str, CellFigures] = field(default_factory=dict)
    by_category: Mapping[str, GroupFigures] = field(default_factory=dict)
    by_image_kind: Mapping[str, GroupFigures] = field(default_factory=dict)

    def cell(self, name: str) -> CellFigures:
        return self.by_cell.get(name, CellFigures())


@dataclass(frozen=True)
class Difference:
    """A share under a defence minus that without, on the same `n` questions; `p` of the exact McNemar test."""

    difference: float | None = None
    ci95: Interval | None = None
    p: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Differences:
    """A defence beside none; `by_cell` of failures, which are attacks that succeed or benign requests refused."""

    asr: Difference = Difference()
    over_refusal: Difference = Difference()
    utility: Difference = Difference()
    by_cell: Mapping[str, Difference] = field(default_factory=dict)

    def cell(self, name: str) -> Difference:
        return self.by_cell.get(name, Difference())


@dataclass(frozen=True)
class ScenarioMeans:
    """MM-SafetyBench's own figures: unweighted means of the scenarios' attack success, of all 13 and of eight."""

    mean_13: float | None = None
    mean_8: float | None = None


@dataclass(frozen=True)
class About:
    """What a reader needs to know beside the figures."""

    split: str | None = None
    limit_per_cell: int | None = None
    checkpoint: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """results.json. `paired` holds every defence beside `direct`; `mm_safetybench` is None for other benchmarks."""

    benchmark: str | None = None
    source: str | None = None
    n: int | None = None
    judge: str | None = None
    date: str | None = None
    about: About = About()
    defences: Mapping[str, DefenceFigures] = field(default_factory=dict)
    paired: Mapping[str, Differences] = field(default_factory=dict)
    mm_safetybench: Mapping[str, ScenarioMeans] | None = None

    @property
    def direct(self) -> DefenceFigures:
        """Without any defence."""
        return self.defences.get("direct", DefenceFigures())

    @property
    def shiftdc(self) -> DefenceFigures:
        """With the checkpoint's own settings."""
        return self.defences.get("shiftdc", DefenceFigures())

    @property
    def effect(self) -> Differences:
        """The checkpoint's own settings beside no defence."""
        return self.paired.get("shiftdc", Differences())
