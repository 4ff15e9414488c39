"""What is measured, of a toy: layers that read letters, small enough to compute everything again, one prompt at a time."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch
from noted_batches import NotedBatches
from PIL import Image
from torch import nn

from exporter.data.calibration import CalibrationRow, CalibrationSet
from exporter.data.images import blank_image, typographic_image
from exporter.data.pictures import Picture
from exporter.directions import fit
from exporter.directions.directions import DIFFERENCE, GRADIENT
from exporter.directions.fit import fit_directions, image_rows
from exporter.directions.refusal_gradient import Opener
from exporter.directions.statistics import LayerStatistics, auroc, separation
from exporter.errors import InputError
from exporter.models.recipe import Wording
from exporter.runtime.padding import left_padded

PROMPTS = Wording(caption="?", text_counterpart="{request}|{caption}")
HARMLESS = ("a red cake", "kites", "some warm bread", "songs", "a small lamp")
HARMFUL = ("a bomb", "poison in tea", "rifles", "a scam on old people")
HELD_OUT = {"safe": ("a shelf", "puzzles", "long scarfs"), "unsafe": ("a trap", "a keylogger")}


@dataclass(frozen=True)
class Square(Picture):
    grey: int

    def load(self):
        return Image.new("RGB", (1, 1), (self.grey,) * 3)

    def identity(self):
        return str(self.grey)


class Toy:
    """The letters so far are summed, and go through linear layers; a picture is a letter of its shade."""

    device = torch.device("cpu")
    traits = SimpleNamespace(stream_axis=None)

    def __init__(self, layers=3):
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(300, 6, generator=generator)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.model, self.image_layers = SimpleNamespace(), frozenset()

    @property
    def decoder_layers(self):
        return self.layers

    def token_ids(self, request, image=None):
        shade = [] if image is None else [256 + image.getpixel((0, 0))[0] // 8]
        return [*shade, *request.encode()]

    def encode(self, requests, images):
        return self.pad([self.token_ids(r, i) for r, i in zip(requests, images, strict=True)])

    def pad(self, prompts):
        ids, mask = map(torch.tensor, left_padded(prompts, 0))
        return {"input_ids": ids, "attention_mask": mask}

    def backbone(self, inputs):
        hidden = (self.embedding[inputs["input_ids"]] * inputs["attention_mask"][..., None]).cumsum(1)
        for layer in self.layers:
            hidden = layer(hidden)

    @torch.no_grad()
    def alone(self, request, image=None):
        """[layers, hidden], float64, of one prompt."""
        hidden, found = self.embedding[self.token_ids(request, image)].sum(0), []
        for layer in self.layers:
            hidden = layer(hidden)
            found.append(hidden)
        return torch.stack(found).double()

    def mean(self, rows, picture=lambda row: None, text=lambda row: row.request):
        return torch.stack([self.alone(text(r), picture(r)) for r in rows]).mean(0)


def row(label, request, split="fit", grey=None):
    picture = None if grey is None else Square(grey)
    return CalibrationRow(label=label, request=request, caption=f"of {request[::-1]}!", split=split, image=picture)


def counterpart(row):
    return f"{row.request}|{row.caption}"


def calibration(harmful=HARMFUL, held_out=("safe", "unsafe"), pictures=True):
    """Safe and unsafe rows by turns."""
    labelled = [(label, r) for label, requests in (("safe", HARMLESS), ("unsafe", harmful)) for r in requests]
    labelled.sort(key=lambda pair: pair[1][::-1])
    shown = [row(label, r, grey=13 * i if pictures else None) for i, (label, r) in enumerate(labelled)]
    kept = [row(label, r, "held_out") for label in held_out for r in HELD_OUT[label]]
    return CalibrationSet("toy", tuple(shown + kept), "0" * 64)


@pytest.fixture
def toy():
    return Toy()


def measured(toy, rows, **options):
    return fit_directions(toy, rows, PROMPTS, **options)


def close(found, expected):
    return found == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)


def column(found, name):
    return [getattr(s, name) for s in found.statistics]


def test_everything_is_what_one_prompt_at_a_time_gives(toy):
    rows = calibration()
    found = measured(toy, rows, batch_size=2)
    fitted = {label: rows.select("fit", label) for label in ("safe", "unsafe")}
    text = {label: toy.mean(chosen, text=counterpart) for label, chosen in fitted.items()}
    image = {label: toy.mean(chosen, lambda r: r.image.load()) for label, chosen in fitted.items()}
    vector = text["safe"] - text["unsafe"]
    d = vector / vector.norm(dim=-1, keepdim=True)
    shift = sum((image[label] - text[label]) / 2 for label in image)
    blank = toy.mean(rows.select("fit"), lambda r: blank_image()) - toy.mean(rows.select("fit"))
    assert found.layers == (0, 1, 2)
    assert found.origin == DIFFERENCE
    assert found.direction.dtype == found.shift.dtype == torch.float32
    assert torch.allclose(found.direction.double(), d, atol=1e-5)
    assert close(found.shift.tolist(), (shift * d).sum(-1))
    assert column(found, "layer") == [0, 1, 2]
    assert close(column(found, "norm"), vector.norm(dim=-1))
    for label in ("safe", "unsafe"):
        assert close(column(found, f"text_{label}"), (text[label] * d).sum(-1))
        assert close(column(found, f"image_{label}"), (image[label] * d).sum(-1))
    assert close(column(found, "shift"), (shift * d).sum(-1))
    assert close(column(found, "blank_shift"), (blank * d).sum(-1))
    assert close(column(found, "shift_cosine"), torch.cosine_similarity(image["unsafe"] - text["unsafe"], vector, dim=-1))
    assert column(found, "gradient") == [None] * 3
    first, second = (toy.mean(fitted["safe"][h::2], text=counterpart) - toy.mean(fitted["unsafe"][h::2], text=counterpart)
                     for h in (0, 1))  # fmt: skip
    assert close(column(found, "split_half_cosine"), torch.cosine_similarity(first, second, dim=-1))
    held_out = {
        label: torch.stack([(toy.alone(counterpart(r)) * d).sum(-1) for r in rows.select("held_out", label)]) for label in text
    }
    pairs = list(zip(held_out["safe"].unbind(1), held_out["unsafe"].unbind(1), strict=True))
    assert column(found, "auroc") == [auroc(*pair) for pair in pairs]
    assert close(column(found, "separation"), torch.tensor([separation(*pair) for pair in pairs]))


def test_directions_are_of_the_layers_asked_for_that_every_prompt_runs(toy):
    rows, whole = calibration(), measured(toy, calibration())
    toy.image_layers = frozenset({1})
    found = measured(toy, rows)
    assert found.layers == (0, 2)
    assert torch.allclose(found.direction, whole.direction[[0, 2]], atol=1e-5)
    found = measured(toy, rows, layers=[1, 2])
    assert found.layers == (2,)
    assert column(found, "layer") == [2]
    assert torch.allclose(found.shift, whole.shift[2:], atol=1e-5)
    direction, shift = found.of(2)
    assert torch.equal(direction, found.direction[0])
    assert shift == found.shift[0]
    with pytest.raises(ValueError, match="not in tuple"):
        found.of(0)


def test_each_stage_runs_in_batches_and_shows_how_far_it_is(toy, monkeypatch):
    monkeypatch.setattr(fit, "BLANK_IMAGES", 2)
    runner, seen = NotedBatches(), []
    measured(toy, calibration(), batch_size=4, runner=runner, progress=lambda *at: seen.append(at))
    assert runner.sizes == [
        ("text", [4, 4, 1]),
        ("held-out text", [3]),
        ("held-out text", [2]),
        ("images", [4, 4, 1]),
        ("image counterparts", [4, 4, 1]),
        ("blank images", [4]),
        ("requests alone", [4]),
    ]
    nine = [4, 8, 9]
    assert seen == [
        *(("text", n, 9) for n in nine),
        ("held-out text", 3, 3),
        ("held-out text", 2, 2),
        *(("images", n, 9) for n in nine),
        *(("image counterparts", n, 9) for n in nine),
        ("blank images", 4, 4),
        ("requests alone", 4, 4),
    ]


def test_an_image_s_place_in_the_prompt_counts_for_the_size_of_a_batch(toy, monkeypatch):
    monkeypatch.setattr("exporter.directions.activations.AUTO_TOKENS", {"cpu": 30})
    rows = [row(label, "a" * 9 + end, grey=8) for label, ends in (("safe", "bcd"), ("unsafe", "efg")) for end in ends]
    runner = NotedBatches()
    measured(toy, CalibrationSet("toy", tuple(rows), ""), runner=runner)
    sizes = dict(runner.sizes)
    assert sizes["images"] == [2, 2, 2]  # 11 tokens each
    assert sizes["requests alone"] == [3, 3]  # 10


def test_images_are_those_of_the_requests_or_typography(toy):
    rows = calibration(pictures=False)
    fitted = rows.select("fit", "safe")
    found = measured(toy, rows)
    expected = toy.mean(fitted, lambda r: typographic_image(r.caption))
    assert close(column(found, "image_safe"), (expected * found.direction.double()).sum(-1))


@pytest.mark.parametrize(("count", "step", "chosen"), [(63, 1, 63), (64, 1, 64), (130, 2, 64), (200, 3, 64)])
def test_typography_is_made_for_some_of_each_label_spread_over_all(count, step, chosen):
    rows = [row(label, f"{label} {i}") for label, some in (("unsafe", count), ("safe", 2)) for i in range(some)]
    found = image_rows(CalibrationSet("toy", (*rows, row("safe", "kept", "held_out")), ""))
    assert [r.request for r in found] == ["safe 0", "safe 1", *(f"unsafe {step * i}" for i in range(chosen))]


def test_all_images_of_a_set_are_run():
    rows = tuple(row("safe", str(i), grey=i) for i in range(130))
    assert image_rows(CalibrationSet("toy", (*rows, row("safe", "kept", "held_out", 1)), "")) == list(rows)


def test_one_unsafe_row_has_no_second_half(toy):
    found = measured(toy, calibration(harmful=HARMFUL[:1], held_out=("safe",)))
    assert column(found, "split_half_cosine") == column(found, "auroc") == column(found, "separation") == [None] * 3
    assert None not in column(found, "shift_cosine")


# Without harmful rows.

OPENERS = (Opener("I am sorry", 7, -1.23), Opener("Sorry", 9, -3.46))


@pytest.fixture
def gradients(monkeypatch):
    """What each of five prompts has for a gradient and for an activation, but for the prompts left out; what was asked for."""
    drawn = torch.randn(5, 2, 3, 6, generator=torch.Generator().manual_seed(1))
    state = SimpleNamespace(drawn=drawn, batches=[[2, 0], [4, 3]], asked=[])

    def found(vlm, layers, prompts, tokens, batch_size, runner, progress):
        state.asked.append((vlm, list(layers), prompts, tokens, batch_size, runner))
        progress("gradients", 5, 5)
        for indices in state.batches:
            yield indices, drawn[indices, 0], drawn[indices, 1]

    def openers(vlm, requests, prompts):
        state.asked.append((vlm, requests, prompts))
        return OPENERS

    monkeypatch.setattr(fit, "refusal_gradients", found)
    monkeypatch.setattr(fit, "find_openers", openers)
    return state


def test_without_harmful_rows_directions_are_against_the_gradient_of_refusal(toy, gradients):
    rows, runner, seen = calibration(harmful=(), held_out=("safe",)), NotedBatches(), []
    found = measured(toy, rows, batch_size=2, runner=runner, progress=lambda *at: seen.append(at))
    fitted = rows.select("fit")
    prompts = [list(counterpart(r).encode()) for r in fitted]
    assert gradients.asked == [
        (toy, [r.request for r in fitted], prompts),
        (toy, list(toy.layers), prompts, [7, 9], 2, runner),
    ]
    assert seen[0] == ("gradients", 5, 5)
    drawn = gradients.drawn.double()
    vector = -drawn[[0, 2, 3, 4], 0].mean(0)
    d = vector / vector.norm(dim=-1, keepdim=True)
    assert torch.allclose(found.direction.double(), d, atol=1e-5)
    assert found.origin == f'{GRADIENT} "I am sorry" (log probability -1.2), "Sorry" (log probability -3.5)'
    assert close(column(found, "gradient"), vector.norm(dim=-1))
    assert close(column(found, "split_half_cosine"), torch.cosine_similarity(drawn[[0, 2, 4], 0].mean(0), drawn[3, 0], dim=-1))
    assert close(column(found, "text_safe"), (drawn[[0, 2, 3, 4], 1].mean(0) * d).sum(-1))
    image, text = toy.mean(fitted, lambda r: r.image.load()), toy.mean(fitted, text=counterpart)
    assert close(column(found, "image_safe"), (image * d).sum(-1))
    assert close(found.shift.tolist(), ((image - text) * d).sum(-1))
    unknown = {f.name for f in fields(LayerStatistics) if column(found, f.name) == [None] * 3}
    assert unknown == {"norm", "auroc", "separation", "text_unsafe", "image_unsafe", "shift_cosine"}


@pytest.mark.parametrize("answered", [[[2, 0], [4]], [[1, 3]], []])
def test_harmless_rows_whose_answers_begin_as_refusals_give_no_direction(toy, gradients, answered):
    gradients.batches = answered
    with pytest.raises(InputError) as caught:
        measured(toy, calibration(harmful=()))
    assert str(caught.value) == (
        "--calibration: the model begins its answers to harmless rows as it begins refusals, so no direction can be found; "
        "use a set with unsafe rows."
    )


def test_a_gradient_of_nothing_gives_no_direction(toy, gradients):
    gradients.drawn[:, 0, 1] = 0
    with pytest.raises(InputError, match="at decoder layer 1 "):
        measured(toy, calibration(harmful=()))


def test_a_gradient_is_small_beside_nothing_but_itself(toy, gradients):
    gradients.drawn[:, 1] *= 1e9
    assert measured(toy, calibration(harmful=())).layers == (0, 1, 2)


# What gives no direction.


def test_activations_that_are_no_numbers_name_their_layer(toy):
    toy.layers[2].bias.data[0] = torch.inf
    with pytest.raises(InputError) as caught:
        measured(toy, calibration(), layers=[1, 2])
    assert str(caught.value) == (
        "MODEL: activations of decoder layer 2 are not finite: its weights are damaged, or too large for the dtype; fetch it "
        "again, or give --dtype float32."
    )


def one_letter_apart(toy, size, difference):
    """Activations [size, 0, 0, 0, 0, 0] of safe rows and, of unsafe ones, larger by `difference`; the caption is nothing."""
    toy.embedding = torch.zeros(300, 6)
    toy.embedding[list(b"su"), 0] = torch.tensor([size, size + difference])
    for layer in toy.layers:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    rows = calibration().rows[:1]
    shown = [rows[0].model_copy(update={"label": label, "request": label[0], "caption": " "}) for label in ("safe", "unsafe")]
    return replace(calibration(), rows=tuple(shown * 2))


def test_two_sides_that_differ_by_rounding_alone_have_no_direction(toy):
    with pytest.raises(InputError) as caught:
        measured(toy, one_letter_apart(toy, 1e4, 2e-3), layers=[1])
    assert str(caught.value) == (
        "--calibration: at decoder layer 1 safe and unsafe requests have the same mean activation, so there is no direction "
        "between them; give a set whose two sides differ."
    )
    assert measured(toy, one_letter_apart(toy, 1e4, 0.05)).direction[0].tolist() == [-1, 0, 0, 0, 0, 0]
