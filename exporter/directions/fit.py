"""Safety directions and the statistics that justify them (arXiv:2502.13095, Eq. 1-6).

Where a calibration set has no unsafe rows, directions come from `refusal_gradient` and some statistics are not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from exporter.data.calibration import CalibrationRow, CalibrationSet
from exporter.data.images import blank_image, row_image
from exporter.directions.activations import RunningMean, by_length, last_token_activations
from exporter.directions.directions import DIFFERENCE, GRADIENT, Directions
from exporter.directions.refusal_gradient import find_openers, refusal_gradients
from exporter.directions.statistics import LayerStatistics, cosines, separations
from exporter.errors import InputError
from exporter.models.recipe import Wording
from exporter.models.vlm import VLM
from exporter.runtime.batches import Batches
from exporter.runtime.progress import Progress, silent

#: Requests per label whose images are run where the set has none of its own (typography is rendered then).
RENDERED_IMAGES = 64

#: Requests per label that are run with a blank image.
BLANK_IMAGES = 16


def fit_directions(
    vlm: VLM,
    calibration: CalibrationSet,
    prompts: Wording,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    runner: Batches | None = None,
    progress: Progress = silent,
) -> Directions:
    """Measure directions at `layers` (default: all) from text alone, and how images shift along them.

    Both sides go through the chat template. Means are streamed in float64.
    """
    modules = vlm.decoder_layers
    chosen = tuple(i for i in (range(len(modules)) if layers is None else layers) if i not in vlm.image_layers)
    reader = _Reader(vlm, [modules[i] for i in chosen], prompts, batch_size, progress, runner or Batches())
    vectors = _difference(reader, calibration) if calibration.select("fit", "unsafe") else _gradient(reader, calibration)
    norm = vectors.norm
    _check_norms(norm, vectors.means["safe"].norm(dim=-1) if vectors.labelled else torch.zeros_like(norm), chosen)
    direction = vectors.vector / norm[:, None]
    held_out = {
        label: (reader.all_text("held-out text", rows).double() * direction).sum(-1)
        for label in ("safe", "unsafe")
        if (rows := calibration.select("held_out", label))
    }
    image, text = reader.image_means(image_rows(calibration))
    blank, alone = reader.blank_means(_first_of_each(calibration, BLANK_IMAGES))
    shift = torch.stack([image[k] - text[k] for k in image]).mean(0)
    measured = _Measured(vectors, direction, held_out, image, text, shift, blank - alone)
    statistics = tuple(measured.statistics(chosen))
    return Directions(chosen, direction.float(), (shift * direction).sum(-1).float(), statistics, vectors.origin)


@dataclass(frozen=True)
class _Vectors:
    """From unsafe to safe, float64 [layers, hidden]: of all fit rows, of two halves of them, and mean activations by label."""

    vector: torch.Tensor
    halves: tuple[torch.Tensor, torch.Tensor] | None
    means: dict[str, torch.Tensor]
    origin: str

    @property
    def labelled(self) -> bool:
        """Whether there were unsafe rows."""
        return "unsafe" in self.means

    @property
    def norm(self) -> torch.Tensor:
        """[layers]."""
        return self.vector.norm(dim=-1)


@dataclass(frozen=True)
class _Measured:
    """What statistics are made of: activations [layers, hidden], float64, by label where they are dicts.

    held_out: coordinates [rows, layers] of held-out text. image, text: means with an image, and of the text-only counterparts.
    shift: mean over labels. blank: what a blank image changes.
    """

    vectors: _Vectors
    direction: torch.Tensor
    held_out: dict[str, torch.Tensor]
    image: dict[str, torch.Tensor]
    text: dict[str, torch.Tensor]
    shift: torch.Tensor
    blank: torch.Tensor

    def statistics(self, layers: Sequence[int]) -> Iterator[LayerStatistics]:
        labelled, unknown = self.vectors.labelled, [None] * len(layers)
        norm = self.vectors.norm.tolist()
        halves = cosines(*self.vectors.halves) if self.vectors.halves else unknown
        # Eq. 5, mean over unsafe rows
        shift_cosine = cosines(self.image["unsafe"] - self.text["unsafe"], self.vectors.vector) if labelled else unknown
        held_out = separations(self.held_out, len(layers))
        text, image = ({k: self._along(v) for k, v in means.items()} for means in (self.vectors.means, self.image))
        shift, blank = self._along(self.shift), self._along(self.blank)
        for i, layer in enumerate(layers):
            yield LayerStatistics(
                layer=layer,
                norm=norm[i] if labelled else None,
                auroc=held_out["auroc"][i],
                separation=held_out["separation"][i],
                split_half_cosine=halves[i],
                text_safe=text["safe"][i],
                text_unsafe=text["unsafe"][i] if labelled else None,
                image_safe=image["safe"][i],
                image_unsafe=image["unsafe"][i] if labelled else None,
                shift=shift[i],
                shift_cosine=shift_cosine[i],
                blank_shift=blank[i],
                gradient=None if labelled else norm[i],
            )

    def _along(self, activations: torch.Tensor) -> list[float]:
        """Coordinates of means [layers, hidden]."""
        return (activations * self.direction).sum(-1).tolist()


def _difference(reader: _Reader, calibration: CalibrationSet) -> _Vectors:
    """Eq. 4: difference of means."""
    halves = {(label, half): RunningMean() for label in ("safe", "unsafe") for half in (0, 1)}
    labelled = [(label, i % 2, r) for label in ("safe", "unsafe") for i, r in enumerate(calibration.select("fit", label))]
    groups = [(label, half) for label, half, _ in labelled]
    for indices, activations in reader.text("text", [r for _, _, r in labelled]):
        for key in halves:
            chosen = [n for n, i in enumerate(indices) if groups[i] == key]
            if chosen:
                halves[key].update(activations[chosen])
    means = {label: _merged(halves[label, 0], halves[label, 1]).mean for label in ("safe", "unsafe")}
    two = None
    if all(stats.count for stats in halves.values()):  # one unsafe row has no second half
        first, second = (halves["safe", h].mean - halves["unsafe", h].mean for h in (0, 1))
        two = first, second
    return _Vectors(means["safe"] - means["unsafe"], two, means, DIFFERENCE)


def _gradient(reader: _Reader, calibration: CalibrationSet) -> _Vectors:
    """Against the way to a refusal, averaged over harmless rows."""
    rows = calibration.select("fit")
    prompts = reader.prompts_of(rows)
    openers = find_openers(reader.vlm, [r.request for r in rows], prompts)
    halves, activations = (RunningMean(), RunningMean()), RunningMean()
    tokens = [o.token for o in openers]
    batches = refusal_gradients(reader.vlm, reader.layers, prompts, tokens, reader.batch_size, reader.runner, reader.progress)
    for indices, gradients, read in batches:
        activations.update(read)
        for half in (0, 1):
            chosen = [n for n, i in enumerate(indices) if i % 2 == half]
            if chosen:
                halves[half].update(-gradients[chosen])
    if not all(stats.count for stats in halves):
        raise InputError(
            "--calibration: the model begins its answers to harmless rows as it begins refusals, so no direction can be found; "
            "use a set with unsafe rows."
        )
    words = ", ".join(f'"{o.text}" (log probability {o.log_probability:.1f})' for o in openers)
    vector = _merged(*halves).mean
    return _Vectors(vector, (halves[0].mean, halves[1].mean), {"safe": activations.mean}, f"{GRADIENT} {words}")


def _check_norms(norm: torch.Tensor, size: torch.Tensor, layers: Sequence[int]) -> None:
    """Raise InputError where safe and unsafe means [layers] do not differ by more than rounding, or are no numbers."""
    for layer, length, whole in zip(layers, norm.tolist(), size.tolist(), strict=True):
        if not math.isfinite(length):
            raise InputError(
                f"MODEL: activations of decoder layer {layer} are not finite: its weights are damaged, or too large for the "
                "dtype; fetch it again, or give --dtype float32."
            )
        if length <= 1e-6 * whole:
            raise InputError(
                f"--calibration: at decoder layer {layer} safe and unsafe requests have the same mean activation, so there is no "
                "direction between them; give a set whose two sides differ."
            )


def _merged(*parts: RunningMean) -> RunningMean:
    whole = RunningMean()
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


def image_rows(calibration: CalibrationSet) -> list[CalibrationRow]:
    """The rows whose images are run."""
    return calibration.select("fit") if calibration.has_images else _first_of_each(calibration, RENDERED_IMAGES)


@dataclass(frozen=True)
class _Reader:
    """Runs prompts through the model and hands out last-token activations batch by batch."""

    vlm: VLM
    layers: Sequence[torch.nn.Module]
    prompts: Wording
    batch_size: int | None
    progress: Progress
    runner: Batches

    def run(self, stage: str, prompts: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(indices, activations [batch, layers, hidden]) of text prompts, in order of length."""
        done = 0
        batches = by_length(range(len(prompts)), [len(p) for p in prompts], self.batch_size, self.vlm.device)

        def compute(indices: list[int]) -> torch.Tensor:
            return last_token_activations(self.vlm, self.layers, self.vlm.pad([prompts[i] for i in indices]))

        for indices, activations in self.runner.run(stage, batches, compute):
            yield indices, activations
            done += len(indices)
            self.progress(stage, done, len(prompts))

    def text(self, stage: str, rows: Sequence[CalibrationRow]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Text-only counterparts (request and caption)."""
        return self.run(stage, self.prompts_of(rows))

    def prompts_of(self, rows: Sequence[CalibrationRow]) -> list[list[int]]:
        return [self.vlm.token_ids(self.prompts.counterpart(r.request, r.caption)) for r in rows]

    def all_text(self, stage: str, rows: Sequence[CalibrationRow]) -> torch.Tensor:
        """[rows, layers, hidden], in the order of `rows`."""
        parts = list(self.text(stage, rows))
        order = torch.tensor([i for indices, _ in parts for i in indices])
        return torch.cat([a for _, a in parts])[order.argsort()]

    def images(
        self, stage: str, requests: Sequence[str], pictures: Sequence[Callable[[], Image.Image]]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Prompts with images, made when they are needed."""
        width = len(self.vlm.token_ids(requests[0], pictures[0]()))
        batches = by_length(range(len(requests)), [width] * len(requests), self.batch_size, self.vlm.device)
        done = 0

        def compute(indices: list[int]) -> torch.Tensor:
            inputs = self.vlm.encode([requests[i] for i in indices], [pictures[i]() for i in indices])
            return last_token_activations(self.vlm, self.layers, inputs)

        for indices, activations in self.runner.run(stage, batches, compute):
            yield indices, activations
            done += len(indices)
            self.progress(stage, done, len(requests))

    def image_means(self, rows: Sequence[CalibrationRow]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Mean activations [layers, hidden] by label: with the image, and of the text-only counterpart."""
        labels = sorted({r.label for r in rows})
        with_image, with_text = ({label: RunningMean() for label in labels} for _ in range(2))
        pictures = [partial(row_image, row) for row in rows]
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
        blank, alone = RunningMean(), RunningMean()
        requests = [r.request for r in rows]
        for _, activations in self.images("blank images", requests, [blank_image] * len(rows)):
            blank.update(activations)
        for _, activations in self.run("requests alone", [self.vlm.token_ids(r) for r in requests]):
            alone.update(activations)
        return blank.mean, alone.mean
