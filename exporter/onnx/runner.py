"""Replies of an ONNX export with ONNX Runtime, numpy and a tokenizer: no PyTorch and no transformers.

    runner = OnnxShiftDC(Path("demo-shiftdc/onnx"))
    runner.reply(["What is this?"], [image])                      # the checkpoint's own settings
    runner.reply(["What is this?"], [image], reference="static")  # one pass
    runner.reply(["What is this?"], [image], reference=None)      # uncalibrated

One decoder graph serves the caption, the text-only pass and the calibrated pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from exporter.errors import InputError
from exporter.modeling.prompts_shiftdc import PromptComposer, PromptFrame
from exporter.onnx.images import ImageProcessor
from exporter.onnx.interface import (
    AMOUNTS,
    COORDINATES,
    DECODER,
    EMBED,
    EXACT,
    GRAPHS,
    GRID,
    MODE,
    OFF,
    STATIC,
    SUFFIXES,
    TARGET,
    VISION,
    graph_file,
    past_names,
    present_names,
)
from exporter.onnx.positions import grid_positions
from exporter.onnx.prompts import PromptWriter
from exporter.onnx.settings import GenerationSettings, ImageSettings, ModelSettings
from exporter.runtime.padding import left_padded
from exporter.runtime.reading import Json

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.generic]
REFERENCES = ("caption", "text", "blank", "static", None)


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: ids and mask [batch, time]; what the processor makes of images, by its names (empty: no image)."""

    ids: Ids
    mask: Ids
    vision: Mapping[str, Array]

    def rows(self) -> list[list[int]]:
        """The prompts without padding."""
        return [ids[mask > 0].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]


@dataclass(frozen=True)
class Correction:
    """How a forward is corrected; `target` float32 [batch or 1, layers] for the kinds EXACT and AMOUNTS."""

    kind: int
    target: Floats | None = None


UNCALIBRATED, BAKED = Correction(OFF), Correction(STATIC)


class OnnxShiftDC:
    """The graphs of an export at one precision. Raises InputError where the folder lacks something."""

    def __init__(self, folder: Path, precision: str = "fp32", threads: int | None = None):
        self.folder, self.precision = folder, precision
        self.config = cast(ModelSettings, _read(folder, "config.json"))
        if "shiftdc" not in self.config:
            raise InputError(f"CHECKPOINT: {folder}/config.json has no 'shiftdc' block; give the onnx folder of an export.")
        settings = self.config["shiftdc"]
        self.settings = settings
        self.columns = len(settings["layers"])
        self.image_token_id = self.config["image_token_id"]
        ends = cast(GenerationSettings, _read(folder, "generation_config.json"))
        eos = ends["eos_token_id"]
        self.eos = [eos] if isinstance(eos, int) else list(eos)
        self.pad = ends.get("pad_token_id", self.eos[0])
        self.writer = PromptWriter(folder, settings["onnx"]["image"])
        self.composer = PromptComposer(PromptFrame.from_json(settings["prompt"]), self.writer, self.image_token_id)
        self.sessions = {graph: _session(folder, graph_file(graph, precision), threads) for graph in GRAPHS}
        self._empty = self._empty_cache()
        names = [i.name for i in self.sessions[VISION].get_inputs()]
        self._vision_names = {name: GRID if name.endswith("grid_thw") else name for name in names}

    # Prompts

    def encode(self, requests: Sequence[str], images: Sequence[Image.Image | None] | None = None) -> Prompts:
        """Prompts with an image each, or none where the image is None."""
        pictures = list(images) if images is not None else [None] * len(requests)
        ids = [self.writer(r, int(p is not None)) for r, p in zip(requests, pictures, strict=True)]
        shown = [p for p in pictures if p is not None]
        if not shown:
            return self.padded(ids)
        images_to_pixels = ImageProcessor(cast(ImageSettings, _read(self.folder, "preprocessor_config.json")))
        return self.padded(ids, {"pixel_values": images_to_pixels(shown)})

    def padded(self, prompts: Sequence[Sequence[int]], vision: Mapping[str, Array] | None = None) -> Prompts:
        ids, mask = (np.array(rows, np.int64) for rows in left_padded(prompts, self.pad))
        return Prompts(ids, mask, vision or {})

    # Replies

    def reply(
        self,
        requests: Sequence[str],
        images: Sequence[Image.Image | None] | None = None,
        *,
        reference: str | None = "default",
        max_new_tokens: int = 128,
    ) -> list[str]:
        """Greedy replies. `reference`: caption, text, blank, static, None (uncalibrated), or the checkpoint's default."""
        prompts = self.encode(requests, images)
        correction = self.correction(prompts, reference)
        return [self.writer.text(ids) for ids in self.generate(prompts, correction, max_new_tokens)]

    def correction(self, prompts: Prompts, reference: str | None = "default") -> Correction:
        """What `generate()` needs for a reference; makes the caption and the passes that it takes."""
        kind = self.settings["reference"] if reference == "default" else reference
        if kind not in REFERENCES:
            raise InputError(f"reference: expected caption, text, blank, static or None, found {kind!r}.")
        if kind is None:
            return UNCALIBRATED
        if kind == "static" or not prompts.vision:
            return BAKED
        return self.towards(prompts, self.reference(prompts, kind))

    def towards(self, prompts: Prompts, target: Floats) -> Correction:
        """The correction to target coordinates [batch, layers] by the checkpoint's rule; precomputed takes a pass of its own."""
        if self.settings["rule"] == "precomputed":
            return Correction(AMOUNTS, self.coordinates(prompts) - target)
        return Correction(EXACT, target)

    def reference(self, prompts: Prompts, kind: str, captions: Sequence[Sequence[int]] | None = None) -> Floats:
        """Target coordinates float32 [batch, layers] of kind caption, text or blank."""
        if kind == "blank":
            pixels = blank(prompts.vision["pixel_values"], self.settings["onnx"]["blank_pixel"])
            return self.coordinates(Prompts(prompts.ids, prompts.mask, {**prompts.vision, "pixel_values": pixels}))
        texts: Sequence[Sequence[int] | None] = [None] * len(prompts.ids)
        if kind == "caption":
            texts = captions if captions is not None else self.captions(prompts)
        pairs = zip(prompts.rows(), texts, strict=True)
        return self.coordinates(self.padded([self.composer.text_prompt(p, None if c is None else list(c)) for p, c in pairs]))

    def captions(self, prompts: Prompts) -> list[list[int]]:
        """The model's own uncalibrated captions in view of the request, as token ids."""
        asked = self.padded([self.composer.caption_prompt(p) for p in prompts.rows()], prompts.vision)
        ends = {self.pad, *self.eos}
        written = self.generate(asked, UNCALIBRATED, self.settings["caption_max_new_tokens"])
        return [[t for t in ids if t not in ends] for ids in written]

    def coordinates(self, prompts: Prompts) -> Floats:
        """Uncorrected coordinates `x.d` of the last token, float32 [batch, layers]."""
        return self.forward(prompts, UNCALIBRATED, [COORDINATES])[COORDINATES].numpy()

    def logits(self, prompts: Prompts, correction: Correction) -> Floats:
        """Of the last token, float32 [batch, vocabulary]."""
        return self.forward(prompts, correction, ["logits"])["logits"].numpy()[:, -1]

    def generate(self, prompts: Prompts, correction: Correction, max_new_tokens: int) -> list[list[int]]:
        """Greedy replies as token ids, up to and without the end of text."""
        presents = present_names(len(self._empty) // 2)
        outputs = self.forward(prompts, correction, ["logits", *presents])
        mask, written = prompts.mask, []
        positions = self._positions(prompts)
        ended = np.zeros(len(mask), bool)
        while True:
            token = outputs["logits"].numpy()[:, -1].argmax(-1)
            token = np.where(ended, self.eos[0], token)
            written.append(token)
            ended |= np.isin(token, self.eos)
            if ended.all() or len(written) == max_new_tokens:
                break
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
            past = dict(zip(self._empty, (outputs[name] for name in presents), strict=True))
            if positions.ndim == 3:
                positions = np.broadcast_to(positions.max((0, 2))[:, None] + 1, (3, len(mask), 1)).copy()
            outputs = self._decode(self._embed(token[:, None]), mask, positions, past, {}, ["logits", *presents])
        rows = np.stack(written, 1).tolist()
        return [until_end(row, self.eos) for row in rows]

    # Graphs

    def forward(self, prompts: Prompts, correction: Correction, outputs: list[str]) -> dict[str, OrtValue]:
        """The pass over whole prompts: OrtValues by output name."""
        embeds = self._embed(prompts.ids)
        if prompts.vision:
            (features,) = self.sessions[VISION].run(None, self._vision_inputs(prompts))
            features = features.reshape(-1, embeds.shape[-1])
            places = prompts.ids == self.image_token_id
            if places.sum() != len(features):
                raise InputError(f"The prompts have {places.sum()} image tokens, and the images {len(features)} features.")
            embeds[places] = features
        optional: dict[str, Array] = {MODE: np.array([correction.kind], np.int64)}
        if correction.target is not None:
            optional[TARGET] = np.asarray(correction.target, np.float32)
        batch = len(embeds)
        past = {name: np.zeros((batch, *shape), dtype) for name, (shape, dtype) in self._empty.items()}
        return self._decode(embeds, prompts.mask, self._positions(prompts), past, optional, outputs)

    def _vision_inputs(self, prompts: Prompts) -> dict[str, Array]:
        """What the vision encoder takes, by its names. Raises InputError."""
        if missing := {*self._vision_names.values()} - {*prompts.vision}:
            raise InputError(f"The prompts lack {', '.join(sorted(missing))}; give all that the processor made of the images.")
        return {name: prompts.vision[theirs] for name, theirs in self._vision_names.items()}

    def _positions(self, prompts: Prompts) -> Ids:
        """What goes into `position_ids`: nothing to say, or, where the graph needs them, positions [3, batch, time]."""
        if self.settings["onnx"]["message"]:
            return np.zeros((len(prompts.ids), 1), np.int64)
        merge = self.config["vision_config"]["spatial_merge_size"]
        grids = np.asarray(prompts.vision.get(GRID, np.zeros((0, 3))), np.int64)
        return grid_positions(prompts.ids, prompts.mask, self.image_token_id, grids, merge)

    def _embed(self, ids: Ids) -> Floats:
        (embeds,) = self.sessions[EMBED].run(None, {"input_ids": ids})
        return embeds

    def _decode(
        self,
        embeds: Floats,
        mask: Ids,
        positions: Ids,
        past: Mapping[str, Array | OrtValue],
        optional: Mapping[str, Array],
        outputs: list[str],
    ) -> dict[str, OrtValue]:
        """OrtValues by output name; the cache stays in the runtime's memory."""
        from onnxruntime import OrtValue

        arrays = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **optional, **past}
        feeds = {k: OrtValue.ortvalue_from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
        return dict(zip(outputs, self.sessions[DECODER].run_with_ort_values(outputs, feeds), strict=True))

    def _empty_cache(self) -> dict[str, tuple[tuple[int, int, int], type[np.floating]]]:
        """Shape without the batch, and dtype, of an empty key or value by input name."""
        layers = self.config["text_config"]["num_hidden_layers"]
        inputs = {i.name: i for i in self.sessions[DECODER].get_inputs()}
        dtypes: dict[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {n: ((inputs[n].shape[1], 0, inputs[n].shape[3]), dtypes[inputs[n].type]) for n in past_names(layers)}


def until_end(ids: Sequence[int], eos: Sequence[int]) -> list[int]:
    """The ids before the first that ends a text."""
    return list(ids[: next((i for i, token in enumerate(ids) if token in eos), len(ids))])


def blank(pixels: Array, value: float) -> Array:
    """Neutral images; those of a family that takes zeros for padding have another `value`, and padding stays padding."""
    if value == 0:
        return np.zeros_like(pixels)
    images = pixels.any((-3, -2, -1), keepdims=True)
    return np.broadcast_to(images * np.float32(value), pixels.shape).astype(pixels.dtype)


def _read(folder: Path, name: str) -> Json:
    try:
        return json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"CHECKPOINT: {folder} has no readable {name}; give the onnx folder of an export.") from error


def _session(folder: Path, name: str, threads: int | None) -> InferenceSession:
    if not (folder / name).is_file():
        found = [p for p in SUFFIXES if (folder / graph_file(DECODER, p)).is_file()]
        raise InputError(f"CHECKPOINT: {folder} has no {name}; precisions there: {', '.join(found) or 'none'}.")
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError('ONNX Runtime is not installed; run: pip install "shiftdc-export[onnx]"') from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every input that has a default
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])


def is_onnx_folder(folder: Path) -> bool:
    return any((folder / graph_file(DECODER, precision)).is_file() for precision in SUFFIXES)
