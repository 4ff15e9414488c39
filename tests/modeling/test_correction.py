"""The correction of one decoder layer, and the hook that applies it: Eq. 7 of arXiv:2502.13095 on small tensors."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy
import pytest
import torch
from other_device import other_device

from exporter.modeling.modeling_shiftdc import ShiftDCCorrection, ShiftDCReadError, ShiftDCReadout, buffers_sha256, calibrate

HIDDEN = 6


def correction(column=1, strength=1.0, one_sided=False, shift=0.5):
    made = ShiftDCCorrection(HIDDEN, column, strength, one_sided, 7, "")
    made.direction.copy_(torch.nn.functional.normalize(torch.arange(1.0, HIDDEN + 1), dim=0))
    made.shift.fill_(shift)
    made.sha256 = buffers_sha256(made.direction, made.shift)
    return made


@pytest.fixture
def hidden():
    return torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(0))


POSITION = torch.tensor([4, -1, 2])
#: What is wanted in column 1, of which the correction is told; the other columns belong to other layers.
REFERENCE = torch.tensor([[9.0, 0.25], [9.0, 0.0], [9.0, -0.5]])


def coordinates(made, hidden, rows=(0, 2)):
    return torch.stack([hidden[row, POSITION[row]] @ made.direction for row in rows])


def test_the_record_of_buffers_is_that_of_their_bytes():
    direction, shift = torch.tensor([[0.5, -1.0]], dtype=torch.float64), torch.tensor(0.25)
    expected = hashlib.sha256(numpy.array([0.5, -1.0, 0.25], "<f4").tobytes()).hexdigest()
    assert buffers_sha256(direction, shift) == expected


def test_new_buffers_are_no_numbers_and_float32():
    made = ShiftDCCorrection(HIDDEN, 1, 2.0, True, 7, "abc")
    assert made.direction.shape == (HIDDEN,) and made.shift.shape == ()
    assert made.direction.isnan().all() and made.shift.isnan()
    assert made.direction.dtype == made.shift.dtype == torch.float32
    assert (made.layer, made.sha256, made.checked, made.column, made.strength, made.one_sided) == (7, "abc", False, 1, 2.0, True)
    assert set(made.state_dict()) == {"direction", "shift"}
    other = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = ShiftDCCorrection(HIDDEN, 1, 2.0, True, 7, "abc")
    finally:
        torch.set_default_dtype(other)
    assert made.direction.dtype == made.shift.dtype == torch.float32


@pytest.mark.parametrize("move", [lambda c: c.half(), lambda c: c.double(), lambda c: c.to("meta", torch.bfloat16)])
def test_moved_buffers_stay_float32(move):
    made = correction()
    exact = made.direction.clone()
    moved = move(made)
    assert moved is made and made.direction.dtype == made.shift.dtype == torch.float32
    assert made.direction.is_meta or torch.equal(made.direction, exact)


def test_buffers_follow_the_model_to_another_device():
    with other_device() as device:
        made = correction().to(device, torch.bfloat16)
        assert made.direction.device == made.shift.device == device
        assert made.direction.dtype == made.shift.dtype == torch.float32


def test_modules_within_are_moved_too():
    made = correction()
    made.inner = torch.nn.Linear(2, 2)
    assert made.half().inner.weight.dtype == torch.float32  # as all that it holds
    made._apply(lambda t: t + 1, recurse=False)
    assert torch.equal(made.shift, torch.tensor(1.5))
    before = made.inner.weight.clone()
    made._apply(lambda t: t + 1, recurse=False)
    assert torch.equal(made.inner.weight, before)
    made._apply(lambda t: t + 1)
    assert torch.equal(made.inner.weight, before + 1)


def test_a_coordinate_is_replaced_by_the_references(hidden):
    made = correction()
    found = made(hidden, POSITION, REFERENCE)
    assert torch.allclose(coordinates(made, found), REFERENCE[[0, 2], 1], atol=1e-6)
    moved = found - hidden
    assert torch.allclose(moved[0, 4], (moved[0, 4] @ made.direction) * made.direction, atol=1e-6)  # nothing but along d
    moved[0, 4] = moved[2, 2] = 0
    assert not moved.any()


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_strength_is_the_share_that_is_taken_out(hidden, strength):
    made = correction(strength=strength)
    found, before = coordinates(made, made(hidden, POSITION, REFERENCE)), coordinates(made, hidden)
    assert torch.allclose(found, before - strength * (before - REFERENCE[[0, 2], 1]), atol=1e-6)


def test_amounts_that_were_computed_beforehand_win_over_a_reference(hidden):
    made = correction()
    amounts = torch.tensor([[9.0, 0.75], [9.0, 5.0], [9.0, -2.0]])
    found = made(hidden, POSITION, REFERENCE, amounts)
    assert torch.allclose(coordinates(made, hidden) - coordinates(made, found), amounts[[0, 2], 1], atol=1e-6)


def test_without_either_the_baked_shift_is_taken_out(hidden):
    made = correction(shift=0.5)
    found = made(hidden, POSITION)
    assert torch.allclose(coordinates(made, hidden) - coordinates(made, found), torch.full((2,), 0.5), atol=1e-6)


def test_one_sided_never_moves_toward_safe(hidden):
    made = correction(one_sided=True)
    before = coordinates(made, hidden)
    reference = torch.zeros(3, 2)
    reference[0, 1], reference[2, 1] = before[0] + 3, before[1] - 3  # row 0 would be moved toward safe
    found = made(hidden, POSITION, reference)
    assert torch.equal(found[0], hidden[0])
    assert torch.allclose(coordinates(made, found)[1], before[1] - 3, atol=1e-6)


def test_an_amount_of_zero_keeps_the_bits(hidden):
    hidden[0, 4, 0] = -0.0
    for made, amounts in ((correction(strength=0.0), torch.ones(3, 2)), (correction(), torch.zeros(3, 2))):
        found = made(hidden, POSITION, None, amounts)
        assert torch.equal(found, hidden) and bool(torch.signbit(found[0, 4, 0]))


def test_an_amount_of_one_is_an_amount(hidden):
    found = correction()(hidden, POSITION, None, torch.ones(3, 2))
    assert torch.allclose(coordinates(correction(), hidden) - coordinates(correction(), found), torch.ones(2), atol=1e-6)


def test_half_precision_is_computed_in_float32(hidden):
    made, small = correction(), hidden.to(torch.bfloat16)
    found = made(small, POSITION, REFERENCE)
    assert found.dtype == torch.bfloat16
    x = small[0, 4].float()
    expected = (x - (x @ made.direction - REFERENCE[0, 1]) * made.direction).to(torch.bfloat16)
    assert torch.equal(found[0, 4], expected)


def test_position_zero_is_a_position(hidden):
    found = correction()(hidden, torch.tensor([0, -1, -1]), REFERENCE)
    assert not torch.equal(found[0, 0], hidden[0, 0])
    assert torch.equal(found[0, 1:], hidden[0, 1:]) and torch.equal(found[1:], hidden[1:])


def test_a_readout_takes_coordinates_and_changes_nothing(hidden):
    made, readout = correction(), ShiftDCReadout(2, ends_pass=True)
    before = hidden.clone()
    assert made(hidden, POSITION, REFERENCE, readout=readout) is None
    assert torch.equal(hidden, before)
    assert torch.allclose(readout.coordinates[1][[0, 2]], coordinates(made, hidden), atol=1e-6)
    assert readout.coordinates[0] is None and not readout.is_complete


def test_a_readout_is_stacked_by_layer():
    readout = ShiftDCReadout(2, ends_pass=False)
    assert readout.ends_pass is False and readout.coordinates == [None, None]
    readout.coordinates = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    assert readout.is_complete
    assert readout.stacked(torch.device("cpu")).tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert readout.stacked(torch.device("meta")).is_meta


@pytest.mark.parametrize(
    "amounts", [(None, None), (REFERENCE, None), (REFERENCE, REFERENCE * 2)], ids=["shift", "reference", "given"]
)
def test_a_layer_on_another_device_takes_what_lies_elsewhere(hidden, amounts):
    """Layers of one model may lie on several devices; positions and amounts lie on the first, offloaded buffers on the CPU."""
    made = correction()
    expected = made(hidden, POSITION, *amounts)
    read, there = ShiftDCReadout(2, ends_pass=True), ShiftDCReadout(2, ends_pass=True)
    made(hidden, POSITION, readout=read)
    with other_device() as device:
        for layer in (made, correction().to(device)):
            found = layer(hidden.to(device), POSITION, *amounts)
            assert found.device == device and torch.equal(found.cpu(), expected)
            layer(hidden.to(device), POSITION, readout=there)
            assert torch.equal(there.coordinates[1].cpu(), read.coordinates[1])


def test_buffers_are_checked_before_the_first_pass_and_once(hidden):
    made = correction()
    made.sha256 = "other"
    with pytest.raises(ValueError, match=r"layer 7 are not those that config\.json records"):
        made(hidden, POSITION, REFERENCE)
    made.checked = True
    made(hidden, POSITION, REFERENCE)


# the hook


def hooked(hidden, output=None, made=None, **kwargs):
    layer = SimpleNamespace(shiftdc=made or correction())
    return calibrate(layer, (), kwargs, hidden if output is None else output)


@pytest.mark.parametrize("told", [{}, {"shiftdc": None}, {"shiftdc": True}], ids=str)
def test_a_layer_that_knows_no_rows_is_refused(hidden, told):
    with pytest.raises(ValueError) as raised:
        hooked(hidden, **told)
    assert str(raised.value) == (
        "A calibrated decoder layer was run without the calibrated model around it, which knows the rows that hold an image: "
        "call the model's own generate() or forward(), or pass shiftdc=False (no calibration), also for text alone."
    )


def test_a_layer_that_is_told_so_is_the_base_class_s(hidden):
    assert hooked(hidden, shiftdc=False) is None


@pytest.mark.parametrize("amounts", [{}, {"shiftdc_reference": REFERENCE}, {"shiftdc_correction": REFERENCE * 2}])
def test_the_hook_gives_the_layer_what_it_is_to_correct_to(hidden, amounts):
    made = correction()
    expected = made(hidden, POSITION, amounts.get("shiftdc_reference"), amounts.get("shiftdc_correction"))
    assert torch.equal(hooked(hidden, shiftdc_position=POSITION, **amounts), expected)
    out = hooked(hidden, (hidden, "weights", "cache"), shiftdc_position=POSITION, **amounts)
    assert torch.equal(out[0], expected) and out[1:] == ("weights", "cache")


@pytest.mark.parametrize(("layers", "ends_pass", "ends"), [(2, True, False), (1, True, True), (1, False, False)])
def test_a_pass_ends_where_every_coordinate_is_read(hidden, layers, ends_pass, ends):
    readout = ShiftDCReadout(layers, ends_pass)
    given = {"made": correction(column=0), "shiftdc_position": POSITION, "shiftdc_readout": readout}
    if ends:
        with pytest.raises(ShiftDCReadError):
            hooked(hidden, **given)
    else:
        assert hooked(hidden, **given) is None and hooked(hidden, (hidden, 1), **given) is None
    assert readout.coordinates[0] is not None
