"""What a model is asked: questions with where the harm is and what would be a right answer, and named lists of them."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, replace

from exporter.data.cells import Cell, Kind
from exporter.data.pictures import Picture


@dataclass(frozen=True)
class Question:
    """One request. `image`: None where there is text only."""

    id: str
    request: str
    kind: Kind
    cell: Cell
    category: str | None = None
    image_kind: str | None = None
    answer: str | None = None
    image: Picture | None = None


@dataclass(frozen=True)
class Benchmark:
    """Named questions; `source` identifies the data: a package version, the SHA-256 of a file, or a dataset at a commit."""

    name: str
    questions: tuple[Question, ...]
    source: str

    def limited(self, n: int | None) -> Benchmark:
        """At most n questions per cell, image kinds and then categories as even as can be; a larger n adds, never drops."""
        if n is None:
            return self
        cells: dict[str, list[Question]] = defaultdict(list)
        for question in self.questions:
            cells[question.cell].append(question)
        chosen = {q.id for questions in cells.values() for q in _balanced(questions, n)}
        return replace(self, questions=tuple(q for q in self.questions if q.id in chosen))


def _balanced(questions: list[Question], n: int) -> list[Question]:
    """The first n in an order that always goes on with the rarest image kind, and in it the rarest category."""
    groups: dict[tuple[str | None, str | None], deque[Question]] = defaultdict(deque)
    for question in questions:
        groups[question.image_kind, question.category].append(question)
    kinds: Counter[str | None] = Counter()
    categories: Counter[str | None] = Counter()
    chosen: list[Question] = []
    while groups and len(chosen) < n:
        kind, category = min(groups, key=lambda group: (kinds[group[0]], categories[group[1]]))  # the first of equals
        chosen.append(groups[kind, category].popleft())
        kinds[kind] += 1
        categories[category] += 1
        if not groups[kind, category]:
            del groups[kind, category]
    return chosen
