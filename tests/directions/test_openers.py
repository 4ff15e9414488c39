"""Which openers are found, on a model whose probabilities are a table; and gradients row by row, on a few linear layers."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from noted_batches import NotedBatches
from torch import nn

from exporter.directions import refusal_gradient
from exporter.directions.refusal_gradient import DECLINE, OWN_TOKENS, find_openers, refusal_gradients
from exporter.errors import InputError
from exporter.runtime.padding import left_padded

# Openers.

WORDS = ("<unk>", "<s>", "?", "!", "I", "_I", "am", "sorry", "Sorry", "_Sorry", "cannot", "say", "Surely", "_must", "decline")
ID = {word: i for i, word in enumerate(WORDS)}


class WordTokenizer:
    """A space before the first word is part of it; other spaces are nothing."""

    unk_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        first, *rest = text.split()
        words = [f"_{first}" if text.startswith(" ") else first, *rest]
        return {"input_ids": [1] * add_special_tokens + [ID.get(word, 0) for word in words]}


class Table:
    """What follows a token depends on nothing but this token: by weights, 1 for "Surely" and next to nothing without an entry."""

    def __init__(self, weights, declined=()):
        table = torch.full((len(WORDS), len(WORDS)), 1e-6)
        table[:, ID["Surely"]] = 1
        for (before, after), weight in weights.items():
            table[ID[before], ID[after]] = weight
        self.logits = table.log() + 3  # no probabilities yet
        self.declined, self.asked = declined, []

    def __call__(self, input_ids, attention_mask, use_cache, logits_to_keep):
        return SimpleNamespace(logits=self.logits[input_ids][:, -logits_to_keep:])

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
        replies = [[*d, *[2] * (max_new_tokens - len(d))] for d in (self.declined or [[ID["Surely"]]] * len(input_ids))]
        return torch.cat([input_ids, torch.tensor(replies)], dim=1)


def speaker(weights, declined=()):
    """A VLM of the table."""

    def pad(prompts):
        ids, mask = map(torch.tensor, left_padded(prompts, 0))
        return {"input_ids": ids, "attention_mask": mask}

    def encode(requests):
        model.asked.append(requests)
        return pad([[2]] * len(requests))

    def decode(ids):
        return " ".join(WORDS[i].removeprefix("_") for i in ids if WORDS[i] != "?")

    model = Table(weights, declined)
    return SimpleNamespace(model=model, tokenizer=WordTokenizer(), pad=pad, encode=encode, decode=decode)


def log_p(vlm, *words):
    """Of words behind each other, from the table."""
    table = vlm.model.logits.log_softmax(-1)
    return sum(table[ID[a], ID[b]].item() for a, b in itertools.pairwise(words))


SORRY = {("I", "am"): 80, ("am", "sorry"): 99, ("_I", "am"): 80, ("I", "cannot"): 20, ("_I", "cannot"): 20}


def test_openers_are_the_likely_ones_the_best_first_each_by_its_first_token():
    """The rarest is "I cannot", which begins as "I am sorry" does, the best; "_Sorry" is too rare."""
    vlm = speaker({**SORRY, ("?", "I"): 0.3, ("?", "Sorry"): 0.1, ("!", "I"): 0.1, ("!", "Sorry"): 0.2, ("?", "_Sorry"): 0.001})
    found = find_openers(vlm, ["a", "b", "c"], [[2], [4, 3], [5, 2]])
    assert [(o.text, o.token) for o in found] == [("I am sorry", ID["I"]), ("Sorry", ID["Sorry"])]
    ends = ("?", "!", "?")
    for opener, words in zip(found, (("I", "am", "sorry"), ("Sorry",)), strict=True):
        assert opener.log_probability == pytest.approx(sum(log_p(vlm, end, *words) for end in ends) / 3, rel=1e-5)


def test_an_opener_a_tenth_as_likely_is_kept_and_a_rarer_one_is_not():
    for p, kept in ((0.05, ["I", "Sorry"]), (0.02, ["I"])):
        vlm = speaker({**SORRY, ("?", "I"): 0.4, ("?", "Sorry"): p})
        assert [WORDS[o.token] for o in find_openers(vlm, ["a"], [[2]])] == kept


def test_words_that_an_answer_begins_with_are_left_out_in_every_spelling():
    vlm = speaker({**SORRY, ("?", "_I"): 5.0, ("?", "I"): 0.5, ("?", "Sorry"): 0.1})
    assert [o.text for o in find_openers(vlm, ["a"], [[2]])] == ["Sorry"]


def test_where_every_opener_begins_an_answer_too_there_is_none():
    vlm = speaker({("?", "_I"): 5.0, ("!", "_Sorry"): 5.0})
    with pytest.raises(InputError) as caught:
        find_openers(vlm, ["a", "b"], [[2], [3]])
    assert str(caught.value) == (
        "--calibration harmless: the model begins its answers with the tokens with which refusals begin, so they cannot be told "
        "apart by it; use a calibration set with unsafe rows."
    )


@pytest.mark.parametrize(("count", "sample"), [(3, [0, 1, 2]), (20, list(range(0, 16, 2)))])
def test_eight_prompts_spread_over_all_are_looked_at(count, sample):
    """Behind all others the model would say "Sorry"."""
    vlm = speaker({**SORRY, ("?", "Sorry"): 0.5, ("!", "Sorry"): 5.0})
    prompts = [[2] if i in sample else [3] for i in range(count)]
    assert [o.text for o in find_openers(vlm, [f"how {i}" for i in range(count)], prompts)] == ["Sorry"]
    assert vlm.model.asked == [[DECLINE.replace("{request}", f"how {i}") for i in sample]]


def test_the_model_s_own_way_to_decline_is_a_candidate_by_its_first_tokens():
    """Where its reply is a refusal."""
    declined = [[ID[w] for w in words] for words in (("I", "_must", "decline", "say"), ("Surely", "say"))]
    vlm = speaker({("?", "I"): 0.4, ("I", "_must"): 99, ("_must", "decline"): 99, ("decline", "say"): 1e-4}, declined)
    (opener,) = find_openers(vlm, ["a", "b"], [[2], [2]])
    assert opener.text == "I must decline"
    assert opener.log_probability == pytest.approx(log_p(vlm, "?", "I", "_must", "decline"), rel=1e-5)
    assert OWN_TOKENS == 3


def test_logits_come_from_the_language_model_where_that_gives_some():
    """BLIP's outer model demands an image."""
    whole = speaker({**SORRY, ("?", "I"): 0.4})
    inner, outer = whole.model, SimpleNamespace(language_model=whole.model)
    inner.get_output_embeddings = lambda: object()
    pad, whole.model = whole.pad, outer
    whole.pad = lambda prompts: {**pad(prompts), "pixel_values": torch.zeros(1)}
    outer.asked = inner.asked
    assert [o.text for o in find_openers(whole, ["a"], [[2]])] == ["I am sorry"]
    inner.get_output_embeddings = lambda: None
    with pytest.raises(TypeError):  # the outer one is asked, which is none here
        find_openers(whole, ["a"], [[2]])


# Gradients.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(6), nn.Linear(6, 6)

    def forward(self, hidden):
        return hidden + self.linear(self.norm(hidden))


class Reader(nn.Module):
    """A language model that sums what it has read."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers, self.head = nn.Embedding(20, 6), nn.ModuleList(Block() for _ in range(3)), nn.Linear(6, 20)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep):
        hidden = (self.embedding(input_ids) * attention_mask[..., None]).cumsum(1)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden[:, -logits_to_keep:]))


@pytest.fixture
def reader():
    def pad(prompts):
        ids, mask = map(torch.tensor, left_padded(prompts, 0))
        return {"input_ids": ids, "attention_mask": mask}

    return SimpleNamespace(model=Reader(), device=torch.device("cpu"), pad=pad, traits=SimpleNamespace(stream_axis=None))


PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 12]]


def alone(reader, prompt, openers):
    """(gradients, activations) [layers, hidden] of one prompt."""
    ((indices, gradients, activations),) = refusal_gradients(reader, reader.model.layers, [prompt], openers)
    assert indices == [0]
    return gradients[0], activations[0]


def own(reader, prompt):
    return reader.model(**reader.pad([prompt]), use_cache=False, logits_to_keep=1).logits[0, -1].argmax().item()


def unlike_answers(reader):
    answers = {own(reader, p) for p in PROMPTS}
    return [t for t in range(20) if t not in answers][:2]


def test_gradients_come_in_batches_by_length_each_with_its_row(reader):
    openers, runner, seen = unlike_answers(reader), NotedBatches(), []
    layers = reader.model.layers
    found = list(refusal_gradients(reader, layers, PROMPTS, openers, 2, runner, lambda *at: seen.append(at)))
    assert [indices for indices, _, _ in found] == [[1, 2], [4, 0], [3]]
    assert runner.noted == [("gradients", [[1, 2], [4, 0], [3]])]
    assert seen == [("gradients", n, 5) for n in (2, 4, 5)]
    for indices, gradients, activations in found:
        for i, gradient, activation in zip(indices, gradients, activations, strict=True):
            expected = alone(reader, PROMPTS[i], openers)
            assert torch.allclose(gradient, expected[0], atol=1e-4)
            assert torch.allclose(activation, expected[1], atol=1e-4)
    assert not torch.allclose(found[0][1][0], found[0][1][1], atol=1e-2)


def test_activations_and_gradients_are_of_their_layers(reader):
    """Behind the last layer there is a linear map alone."""
    (opener, _), prompt = unlike_answers(reader), PROMPTS[3]
    gradient, activation = alone(reader, prompt, [opener])
    hidden = reader.model.embedding(torch.tensor(prompt)).sum(0)
    for number, layer in enumerate(reader.model.layers):
        hidden = layer(hidden)
        assert torch.allclose(activation[number], hidden, atol=1e-4)
    head = reader.model.head.weight
    assert torch.allclose(gradient[-1], head[opener] - head[own(reader, prompt)], atol=1e-5)


def test_rows_that_are_answered_with_an_opener_are_left_out_and_no_others(reader):
    openers = [own(reader, PROMPTS[2]), *unlike_answers(reader)]
    left = [i for i in range(5) if own(reader, PROMPTS[i]) != openers[0]]
    seen = []
    found = list(refusal_gradients(reader, reader.model.layers, PROMPTS, openers, 5, None, lambda *at: seen.append(at)))
    ((indices, gradients, activations),) = found
    assert sorted(indices) == left
    assert seen == [("gradients", 5, 5)]
    for i, gradient, activation in zip(indices, gradients, activations, strict=True):
        expected = alone(reader, PROMPTS[i], openers)
        assert torch.allclose(gradient, expected[0], atol=1e-4)
        assert torch.allclose(activation, expected[1], atol=1e-4)


def test_norms_are_held_and_weights_are_as_they_were(reader, monkeypatch):
    held = []
    original = refusal_gradient.frozen_norms
    monkeypatch.setattr(refusal_gradient, "frozen_norms", lambda model: held.append(model) or original(model))
    reader.model.head.bias.requires_grad_(False)
    weights = [p.requires_grad for p in reader.model.parameters()]
    alone(reader, PROMPTS[0], unlike_answers(reader))
    assert held == [reader.model]
    assert [p.requires_grad for p in reader.model.parameters()] == weights
    assert all(p.grad is None for p in reader.model.parameters())
