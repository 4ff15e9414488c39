"""Batches that tell in what parts each stage was run."""

from __future__ import annotations

from exporter.runtime.batches import Batches


class NotedBatches(Batches):
    def __init__(self) -> None:
        super().__init__()
        self.noted = []

    def run(self, stage, batches, compute):
        self.noted.append((stage, batches))
        return super().run(stage, batches, compute)

    @property
    def sizes(self):
        return [(stage, [len(b) for b in batches]) for stage, batches in self.noted]
