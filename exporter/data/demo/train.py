"""Train the packaged demo model from nothing: `python -m exporter.data.demo.train`.

The order makes the distortion: a language model that answers everything, aligned to refuse harm in text; a vision tower
that recognises things; then both joined on benign image instructions.
"""

import argparse
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from exporter.data.demo import MODEL
from exporter.data.demo.curriculum import Curriculum, Sample, batches, corpus
from exporter.data.demo.drawing import SIZE, draw
from exporter.data.demo.processor import BOS_ID, EOS_ID, IMAGE, IMAGE_ID, IMAGE_TOKENS, PAD_ID, PATCH, build_processor
from exporter.data.demo.world import COLORS, KINDS, THINGS, Scene

LOG = "training_log.json"
BATCH = 48
WARM_UP = 40
IGNORED = -100
"""Label of a token without loss."""


@dataclass(frozen=True)
class Stage:
    """How long and how fast one part of the training runs."""

    name: str
    steps: int
    rate: float


LANGUAGE = Stage("language model, everything answered", 800, 1.5e-3)
ALIGNMENT = Stage("alignment in text", 400, 1e-3)
VISION = Stage("vision tower, recognition", 2500, 1e-3)
PROJECTOR = Stage("projector, language model frozen", 300, 3e-3)
JOINT = Stage("projector and language model", 650, 1e-3)
REHEARSAL = 0.3
"""Share of aligned text in the joint stage."""


@dataclass(frozen=True)
class Record:
    """What one stage came to: the mean loss of about its last twenty steps, and its duration."""

    stage: Stage
    loss: float
    seconds: float


def build_model(vocabulary: int) -> LlavaForConditionalGeneration:
    """A small LLaVA with random weights: 8 x 128 Llama, 4 x 160 CLIP on 64 x 64 pixels, 16 image tokens."""
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


class Trainer:
    """The model in training and everything its batches are made from."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int) -> None:
        self.model = model.train()
        self.seed, self.rng = seed, random.Random()
        self.curriculum = Curriculum(self.rng)
        self.encode = _encoder(processor)
        self.records: list[Record] = []

    def run(self) -> None:
        """All stages, in order."""
        self.teach(LANGUAGE, lambda: self.curriculum.text(aligned=False), self.language_parameters)
        self.teach(ALIGNMENT, lambda: self.curriculum.text(aligned=True), self.language_parameters)
        self.recognise(VISION)
        self.teach(PROJECTOR, self.curriculum.image, self.projector_parameters)
        both = self.projector_parameters + self.language_parameters
        self.teach(JOINT, lambda: self.curriculum.mixture(REHEARSAL), both)
        self.model.eval()

    @property
    def language_parameters(self) -> list[nn.Parameter]:
        """The text backbone and its output head."""
        return [*self.model.model.language_model.parameters(), *self.model.lm_head.parameters()]

    @property
    def projector_parameters(self) -> list[nn.Parameter]:
        """What maps image features to token embeddings."""
        return list(self.model.model.multi_modal_projector.parameters())

    def teach(self, stage: Stage, draw_sample: Callable[[], Sample], parameters: list[nn.Parameter]) -> None:
        """Fit the parameters, and no others, to the replies of random samples."""
        self.begin(stage)
        for parameter in parameters:
            parameter.requires_grad_(True)
        stream = batches(draw_sample, BATCH)
        self.optimise(stage, parameters, lambda: self.reply_loss(next(stream)))

    def recognise(self, stage: Stage) -> None:
        """Fit the vision tower to tell thing, colour and kind from EVERY patch, so that any image token tells them."""
        self.begin(stage)
        tower = self.model.model.vision_tower.requires_grad_(True)
        sizes = (len(THINGS), len(COLORS), len(KINDS))
        heads = nn.ModuleList(nn.Linear(tower.config.hidden_size, size) for size in sizes)
        self.optimise(stage, [*tower.parameters(), *heads.parameters()], lambda: self.recognition_loss(heads))

    def begin(self, stage: Stage) -> None:
        """Freeze everything and seed the stage by itself, so that it depends on earlier ones through weights only."""
        self.model.requires_grad_(False)
        self.rng.seed(f"{self.seed} {stage.name}")
        torch.manual_seed(self.rng.getrandbits(32))

    def optimise(self, stage: Stage, parameters: list[nn.Parameter], next_loss: Callable[[], Tensor]) -> None:
        """AdamW with warm-up and cosine decay to a twentieth of the rate."""
        optimiser = torch.optim.AdamW(parameters, lr=stage.rate, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _decay(step, stage.steps))
        start, mean = time.time(), 0.0
        for step in range(stage.steps):
            loss = next_loss()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            mean += (loss.item() - mean) / min(step + 1, 20)
            if step % 100 == 99:
                print(f"{stage.name}: step {step + 1}/{stage.steps}, loss {mean:.4f}", flush=True)
        self.records.append(Record(stage, round(mean, 4), round(time.time() - start, 1)))

    def reply_loss(self, samples: list[Sample]) -> Tensor:
        """Next-token loss on the replies of a batch."""
        rows = [self.tokens(sample) for sample in samples]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [PAD_ID] * (width - len(ids)) for ids, _ in rows])  # [batch, tokens]
        labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
        shown = [sample.scene for sample in samples if sample.scene is not None]
        pixels = self.pixels(shown) if shown else None
        return self.model(input_ids=ids, attention_mask=(ids != PAD_ID).long(), pixel_values=pixels, labels=labels).loss

    def recognition_loss(self, heads: nn.ModuleList) -> Tensor:
        """Classification loss of random pictures, averaged over patches and summed over the three questions."""
        shown = [self.curriculum.scene() for _ in range(BATCH)]
        truth = [(THINGS.index(s.thing), COLORS.index(s.color), KINDS.index(s.kind)) for s in shown]
        features = self.model.model.vision_tower(pixel_values=self.pixels(shown)).last_hidden_state[:, 1:]
        losses = []
        for head, labels in zip(heads, torch.tensor(truth).T, strict=True):
            logits = head(features).flatten(0, 1)  # [batch * patches, classes]
            losses.append(F.cross_entropy(logits, labels.repeat_interleave(IMAGE_TOKENS)))
        return torch.stack(losses).sum()

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids of prompt and reply, and their labels."""
        image = IMAGE if sample.scene else ""
        prompt = [BOS_ID, *self.encode(f"USER:{image} {sample.request} ASSISTANT:")]
        reply = [*self.encode(" " + sample.reply), EOS_ID]
        skipped = len(prompt) + sample.unscored
        return prompt + reply, [IGNORED] * skipped + reply[sample.unscored :]

    def pixels(self, shown: list[Scene]) -> Tensor:
        """New drawings as the image processor would hand them over: [pictures, 3, height, width] in [-1, 1]."""
        pictures = [np.asarray(draw(scene, f"training {self.rng.random()}")) for scene in shown]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _encoder(processor: LlavaProcessor) -> Callable[[str], list[int]]:
    """Tokenisation without BOS, image placeholders expanded; kept, since few texts differ."""

    @lru_cache(maxsize=100_000)
    def encode(text: str) -> list[int]:
        expanded = text.replace(IMAGE, IMAGE * IMAGE_TOKENS)
        return processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]

    return encode


def _decay(step: int, steps: int) -> float:
    """Share of the full rate at one step."""
    return min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, log: dict[str, object], output: Path) -> None:
    """Write the model folder beside its final place, then swap it in."""
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID, do_sample=False)
    model.bfloat16().save_pretrained(staging)
    (staging / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read
    processor.save_pretrained(staging)
    _load_in_float32(staging / "config.json")
    (staging / LOG).write_text(json.dumps(log, indent=2) + "\n")
    if output.exists():
        shutil.rmtree(output)
    staging.rename(output)


def _load_in_float32(path: Path) -> None:
    """State float32 in the configuration: weights are stored as bfloat16 only to be small."""
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train(output: Path, seed: int, threads: int) -> None:
    """Train and save the model."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    start = time.time()
    processor = build_processor(corpus())
    trainer = Trainer(build_model(len(processor.tokenizer)), processor, seed)
    trainer.run()
    log = {
        "seed": seed,
        "threads": threads,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "stages": [asdict(record) for record in trainer.records],
        "seconds": round(time.time() - start, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    save(trainer.model, processor, log, output)
    print(f"saved {output} after {log['seconds']} s")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=MODEL, help="folder to write (default: the packaged model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.output.exists() and not (arguments.output / LOG).is_file():
        parser.error(f"--output {arguments.output} exists and holds no {LOG}: it is no demo model; give another folder")
    train(arguments.output, arguments.seed, arguments.threads)


if __name__ == "__main__":
    main()
