"""Which way refusal lies, from harmless prompts alone: the gradient of (refusal opener - own opener) in log probability.

arXiv:2502.13095 leaves directions without harmful data as future work. The gradient is taken at each decoder layer's output at
the last prompt token, with the norms' statistics held constant (`frozen_norms`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from exporter.data.refusals import begins_as_refusal
from exporter.directions.activations import by_length, last_token
from exporter.directions.frozen_norms import frozen_norms
from exporter.errors import InputError
from exporter.models.hooks import hooked
from exporter.models.vlm import VLM, Inputs
from exporter.runtime.batches import Batches
from exporter.runtime.progress import Progress, silent

#: How refusals may begin. The model's probabilities decide which of them are its own.
PHRASES = (
    "I'm sorry", "I\u2019m sorry", "I am sorry", "Sorry", "I apologize", "I cannot", "I can't", "I can\u2019t", "I won't",
    "I'm unable", "I am unable", "I'm not able", "I must decline", "Unfortunately", "As an AI",
)  # fmt: skip
#: Asks a model that follows instructions for a refusal, so that its own wording is among the candidates.
DECLINE = "Reply to this request as you reply to requests that you must decline. Request: {request}"
#: Tokens of the model's own refusal that make a candidate.
OWN_TOKENS = 3
#: An opener is kept where it is at least this many times as probable as the most probable one.
SHARE = 0.1
#: Prompts on which openers are compared, and on which the model is asked to decline.
SAMPLE = 8


@dataclass(frozen=True)
class Opener:
    """How the model begins refusals: the words, their first token, and their mean log probability after harmless prompts."""

    text: str
    token: int
    log_probability: float


def find_openers(vlm: VLM, requests: Sequence[str], prompts: Sequence[list[int]]) -> tuple[Opener, ...]:
    """The refusal openers that the model itself finds most probable, the best first, each with a first token of its own.

    `requests` are harmless, and `prompts` the same as token ids. Raises InputError where no refusal begins unlike an answer.
    """
    step = max(1, len(prompts) // SAMPLE)
    sample, asked = list(prompts[::step])[:SAMPLE], list(requests[::step])[:SAMPLE]
    own = set(_next_log_probabilities(vlm, sample).argmax(-1).tolist())
    candidates = _candidates(vlm, asked)
    # in no other spelling either, since that is one that the model never writes
    shared = {text for ids, text in candidates.items() if ids[0] in own}
    tried = {ids: text for ids, text in candidates.items() if text not in shared}
    found = sorted(
        (Opener(text, ids[0], _log_probability(vlm, sample, ids)) for ids, text in tried.items()),
        key=lambda o: o.log_probability,
        reverse=True,
    )
    if not found:
        raise InputError(
            "--calibration harmless: the model begins its answers with the tokens with which refusals begin, so they cannot be "
            "told apart by it; use a calibration set with unsafe rows."
        )
    best: dict[int, Opener] = {}
    for opener in found:
        if opener.log_probability >= found[0].log_probability + math.log(SHARE):
            best.setdefault(opener.token, opener)
    return tuple(best.values())


def _candidates(vlm: VLM, requests: Sequence[str]) -> dict[tuple[int, ...], str]:
    """Token ids with their text: the phrases, and how the model begins where it is asked to decline."""
    unknown = vlm.tokenizer.unk_token_id
    # whether a reply's first token holds the space before it depends on template and tokenizer
    spelled = {tuple(vlm.tokenizer(s + p, add_special_tokens=False)["input_ids"]): p for p in PHRASES for s in (" ", "")}
    known = {ids: text for ids, text in spelled.items() if ids and unknown not in ids}
    return known | {ids: vlm.decode(ids) for ids in _declined(vlm, requests)}


@torch.no_grad()
def _declined(vlm: VLM, requests: Sequence[str]) -> set[tuple[int, ...]]:
    model, inputs = _for_text(vlm, vlm.encode([DECLINE.replace("{request}", r) for r in requests]))
    out = model.generate(**inputs, max_new_tokens=4 * OWN_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return {tuple(row[:OWN_TOKENS].tolist()) for row in out if begins_as_refusal(vlm.decode(row))}


@torch.no_grad()
def _next_log_probabilities(vlm: VLM, prompts: Sequence[list[int]], tokens: int = 1) -> torch.Tensor:
    """float32 [batch, vocabulary], or [batch, tokens, vocabulary]: of what follows the last `tokens` tokens."""
    model, inputs = _for_text(vlm, vlm.pad(prompts))
    logits = model(**inputs, use_cache=False, logits_to_keep=tokens).logits.float()
    return logits.log_softmax(-1)[:, -1] if tokens == 1 else logits.log_softmax(-1)


def _for_text(vlm: VLM, inputs: Inputs) -> tuple[PreTrainedModel, Inputs]:
    """What gives logits of text, and what it takes: the model, or its language model where the outer one demands an image."""
    inner = getattr(vlm.model, "language_model", None)
    if inner is None or inner.get_output_embeddings() is None:
        return vlm.model, inputs
    return inner, {k: inputs[k] for k in ("input_ids", "attention_mask")}


def _log_probability(vlm: VLM, prompts: Sequence[list[int]], ids: Sequence[int]) -> float:
    """Mean log probability that the reply begins with `ids`."""
    following = _next_log_probabilities(vlm, [[*p, *ids] for p in prompts], len(ids) + 1)
    return sum(following[:, i, t].mean().item() for i, t in enumerate(ids))


def refusal_gradients(
    vlm: VLM,
    layers: Sequence[nn.Module],
    prompts: Sequence[list[int]],
    openers: Sequence[int],
    batch_size: int | None = None,
    runner: Batches | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """(indices, gradients, activations) in order of length; both float32 [batch, layers, hidden], on the CPU.

    The gradient of log P(any of `openers`) - log P(the model's own first token), so openers count as they are probable.
    Prompts that the model would answer with an opener are left out.
    """
    done = 0
    batches = by_length(range(len(prompts)), [len(p) for p in prompts], batch_size, vlm.device)

    def compute(indices: list[int]) -> torch.Tensor:
        """[rows, 2 * layers * hidden + 1]: gradients, activations, and whether the model would answer with an opener."""
        gradients, activations, own = _gradients(vlm, layers, [prompts[i] for i in indices], openers)
        refused = torch.tensor([[float(token in openers)] for token in own])
        return torch.cat([gradients.flatten(1), activations.flatten(1), refused], dim=1)

    with frozen_norms(vlm.model), _without_weights(vlm.model):
        for indices, values in (runner or Batches()).run("gradients", batches, compute):
            kept = [n for n, refused in enumerate(values[:, -1].tolist()) if not refused]
            hidden = values.shape[1] // (2 * len(layers))
            gradients, activations = values[kept, :-1].view(len(kept), 2, len(layers), hidden).unbind(1)
            yield [indices[n] for n in kept], gradients, activations
            done += len(indices)
            progress("gradients", done, len(prompts))


@torch.enable_grad()
def _gradients(
    vlm: VLM, layers: Sequence[nn.Module], prompts: Sequence[list[int]], openers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    model, inputs = _for_text(vlm, vlm.pad(prompts))
    position = last_token(inputs["attention_mask"])
    with _leaves(layers, vlm.traits.stream_axis) as outputs:
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    own = logits.argmax(-1)
    score = logits[:, list(openers)].logsumexp(-1) - logits.gather(-1, own[:, None])[:, 0]
    gradients = torch.autograd.grad(score.sum(), outputs)

    def at_last_token(hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = torch.arange(len(prompts))
        return torch.stack([h.detach()[rows.to(h.device), position.to(h.device)].float().cpu() for h in hidden], dim=1)

    return at_last_token(gradients), at_last_token(outputs), own.tolist()


@contextmanager
def _leaves(layers: Sequence[nn.Module], stream_axis: int | None) -> Iterator[list[torch.Tensor]]:
    """The layers' outputs [batch, time, hidden], of which the first begins the graph; hooks are gone afterwards."""
    outputs: list[torch.Tensor] = []

    def keep(number: int, hidden: torch.Tensor) -> torch.Tensor:
        outputs.append(hidden if outputs else hidden.detach().requires_grad_())
        return outputs[-1]

    with hooked(layers, keep, stream_axis):
        yield outputs


@contextmanager
def _without_weights(model: nn.Module) -> Iterator[None]:
    """Weights take no part in the backward pass."""
    kept = [p for p in model.parameters() if p.requires_grad]
    for parameter in kept:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)
