"""Safety directions and the statistics that justify them (arXiv:2502.13095, Eq. 1-6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from exporter.activations import LastTokenStats, by_length, last_token_activations
from exporter.calibration import CalibrationRow, CalibrationSet, blank_image, row_image
from exporter.recipes import Prompts
from exporter.vlm import VLM

#: Requests per label whose images are run where the set has none of its own (typography is rendered then).
RENDERED_IMAGES = 64
#: Requests per label that are run with a blank image.
BLANK_IMAGES = 16

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerStatistics:
    """What was measured at one decoder layer. Coordinates are projections on the unit direction, in activation units."""

    layer: int
    norm: float  # of mean safe - mean unsafe (Eq. 4), held-in
    auroc: float  # of the coordinate, safe against unsafe, held-out text
    separation: float  # difference of held-out means over their pooled standard deviation
    split_half_cosine: float  # of directions from two halves of the fit rows
    text_safe: float  # mean coordinates
    text_unsafe: float
    image_safe: float
    image_unsafe: float
    shift: float  # mean of (x_image - x_text).d over both labels
    shift_cosine: float  # cos(m, s) of unsafe rows (section 3, observation 2)
    blank_shift: float  # mean of (x_blank - x_request_alone).d


@dataclass(frozen=True)
class Directions:
    """Unit directions from unsafe to safe, float32 [layers, hidden], and mean shifts, float32 [layers]."""

    layers: tuple[int, ...]
    direction: torch.Tensor
    shift: torch.Tensor
    statistics: tuple[LayerStatistics, ...]

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(direction [hidden], shift []) of a decoder layer."""
        row = self.layers.index(layer)
        return self.direction[row], self.shift[row]

    def coordinates(self, activations: torch.Tensor) -> torch.Tensor:
        """Project [..., layers, hidden] on the directions: [..., layers]."""
        return (activations * self.direction.to(activations)).sum(-1)

    def save(self, file: Path) -> None:
        tensors = {"direction": self.direction, "shift": self.shift, "layers": torch.tensor(self.layers)}
        statistics = torch.tensor([list(asdict(s).values()) for s in self.statistics], dtype=torch.float64)
        save_file({**tensors, "statistics": statistics}, file, metadata={"format": "pt"})

    @classmethod
    def load(cls, file: Path) -> Directions:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        statistics = tuple(LayerStatistics(int(row[0]), *row[1:].tolist()) for row in tensors["statistics"])
        return cls(tuple(tensors["layers"].tolist()), tensors["direction"], tensors["shift"], statistics)


def fit_directions(
    vlm: VLM,
    calibration: CalibrationSet,
    prompts: Prompts,
    decoder_layers: str,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Directions:
    """Measure directions at `layers` (default: all) from text alone, and how images shift along them.

    Both sides go through the chat template. Means and variances are streamed in float64.
    """
    modules = vlm.decoder_layers(decoder_layers)
    chosen = tuple(i for i in (range(len(modules)) if layers is None else layers) if i not in vlm.image_layers)
    reader = _Reader(vlm, [modules[i] for i in chosen], prompts, batch_size, progress)

    halves = {(label, half): LastTokenStats() for label in ("safe", "unsafe") for half in (0, 1)}
    labelled = [(label, i % 2, r) for label in ("safe", "unsafe") for i, r in enumerate(calibration.select("fit", label))]
    rows = [r for _, _, r in labelled]
    groups = [(label, half) for label, half, _ in labelled]
    for indices, activations in reader.text("text", rows):
        for key in halves:
            chosen_rows = [n for n, i in enumerate(indices) if groups[i] == key]
            if chosen_rows:
                halves[key].update(activations[chosen_rows])
    first_half, second_half = (halves["safe", h].mean - halves["unsafe", h].mean for h in (0, 1))
    means = {label: _merged(halves[label, 0], halves[label, 1]).mean for label in ("safe", "unsafe")}
    difference = means["safe"] - means["unsafe"]  # Eq. 4
    norm = difference.norm(dim=-1)
    direction = difference / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None]

    def coordinate(activations: torch.Tensor) -> torch.Tensor:
        return (activations * direction).sum(-1)

    held_out = {
        label: coordinate(reader.all_text("held-out text", calibration.select("held_out", label)).double())
        for label in ("safe", "unsafe")
    }
    image, text = reader.image_means(_image_rows(calibration))
    blank, alone = reader.blank_means(_first_of_each(calibration, BLANK_IMAGES))
    shift = coordinate(torch.stack([image[k] - text[k] for k in image]).mean(0))
    moved = image["unsafe"] - text["unsafe"]  # Eq. 5, mean over unsafe rows
    split_half = torch.cosine_similarity(first_half, second_half, dim=-1)
    shift_cosine = torch.cosine_similarity(moved, difference, dim=-1)
    blank_shift = coordinate(blank - alone)
    statistics = tuple(
        LayerStatistics(
            layer=layer,
            norm=norm[i].item(),
            auroc=auroc(held_out["safe"][:, i], held_out["unsafe"][:, i]),
            separation=separation(held_out["safe"][:, i], held_out["unsafe"][:, i]),
            split_half_cosine=split_half[i].item(),
            text_safe=coordinate(means["safe"])[i].item(),
            text_unsafe=coordinate(means["unsafe"])[i].item(),
            image_safe=coordinate(image["safe"])[i].item(),
            image_unsafe=coordinate(image["unsafe"])[i].item(),
            shift=shift[i].item(),
            shift_cosine=shift_cosine[i].item(),
            blank_shift=blank_shift[i].item(),
        )
        for i, layer in enumerate(chosen)
    )
    return Directions(chosen, direction.float(), shift.float(), statistics)


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Probability that a value of `positive` [n] exceeds one of `negative` [m]; ties count half."""
    difference = positive[:, None] - negative[None, :]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def separation(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Difference of the means over the pooled standard deviation (Cohen's d, signed)."""
    pooled = ((positive.var() + negative.var()) / 2).sqrt()
    return ((positive.mean() - negative.mean()) / pooled.clamp_min(1e-12)).item()


def _merged(*parts: LastTokenStats) -> LastTokenStats:
    whole = LastTokenStats()
    for part in parts:
        whole.merge(part)
    return whole


def _first_of_each(calibration: CalibrationSet, count: int) -> list[CalibrationRow]:
    """Every k-th fit row of each label, `count` at most, so that all categories take part."""
    chosen: list[CalibrationRow] = []
    for label in ("safe", "unsafe"):
        rows = calibration.select("fit", label)
        chosen += rows[:: max(1, len(rows) // count)][:count]
    return chosen


def _image_rows(calibration: CalibrationSet) -> list[CalibrationRow]:
    return calibration.select("fit") if calibration.has_images else _first_of_each(calibration, RENDERED_IMAGES)


@dataclass(frozen=True)
class _Reader:
    """Runs prompts through the model and hands out last-token activations batch by batch."""

    vlm: VLM
    layers: Sequence[torch.nn.Module]
    prompts: Prompts
    batch_size: int | None
    progress: Progress

    def run(self, stage: str, prompts: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(indices, activations [batch, layers, hidden]) of text prompts, in order of length."""
        done = 0
        batches = by_length(range(len(prompts)), [len(p) for p in prompts], self.batch_size, self.vlm.device)
        for indices in batches:
            inputs = self.vlm.pad([prompts[i] for i in indices])
            yield indices, last_token_activations(self.vlm, self.layers, inputs)
            done += len(indices)
            self.progress(stage, done, len(prompts))

    def text(self, stage: str, rows: Sequence[CalibrationRow]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Text-only counterparts (request and caption)."""
        return self.run(stage, [self.vlm.token_ids(self.prompts.counterpart(r.request, r.caption)) for r in rows])

    def all_text(self, stage: str, rows: Sequence[CalibrationRow]) -> torch.Tensor:
        """[rows, layers, hidden], in the order of `rows`."""
        parts = list(self.text(stage, rows))
        order = torch.tensor([i for indices, _ in parts for i in indices])
        return torch.cat([a for _, a in parts])[order.argsort()]

    def images(
        self, stage: str, requests: Sequence[str], pictures: Sequence[Callable[[], Image.Image]]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Prompts with images, made when they are needed."""
        if not requests:
            return
        width = len(self.vlm.token_ids(requests[0], pictures[0]()))
        batches = by_length(range(len(requests)), [width] * len(requests), self.batch_size, self.vlm.device)
        done = 0
        for indices in batches:
            inputs = self.vlm.encode([requests[i] for i in indices], [pictures[i]() for i in indices])
            yield indices, last_token_activations(self.vlm, self.layers, inputs)
            done += len(indices)
            self.progress(stage, done, len(requests))

    def image_means(self, rows: Sequence[CalibrationRow]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Mean activations [layers, hidden] by label: with the image, and of the text-only counterpart."""
        with_image = {label: LastTokenStats() for label in ("safe", "unsafe")}
        with_text = {label: LastTokenStats() for label in ("safe", "unsafe")}
        pictures = [lambda r=r: row_image(r) for r in rows]
        for stats, parts in (
            (with_image, self.images("images", [r.request for r in rows], pictures)),
            (with_text, self.text("image counterparts", rows)),
        ):
            for indices, activations in parts:
                for i, activation in zip(indices, activations, strict=True):
                    stats[rows[i].label].update(activation[None])
        return {k: s.mean for k, s in with_image.items()}, {k: s.mean for k, s in with_text.items()}

    def blank_means(self, rows: Sequence[CalibrationRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean activations [layers, hidden] of requests with a blank image, and without any image."""
        blank, alone = LastTokenStats(), LastTokenStats()
        requests = [r.request for r in rows]
        for _, activations in self.images("blank images", requests, [blank_image] * len(rows)):
            blank.update(activations)
        for _, activations in self.run("requests alone", [self.vlm.token_ids(r) for r in requests]):
            alone.update(activations)
        return blank.mean, alone.mean


def summary(directions: Directions) -> list[dict[str, Any]]:
    """Per-layer statistics for the report."""
    return [{k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(s).items()} for s in directions.statistics]
