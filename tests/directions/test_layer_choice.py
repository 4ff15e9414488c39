from __future__ import annotations

import pytest

from exporter.directions.layer_choice import choose_layers
from exporter.directions.statistics import LayerStatistics
from exporter.errors import InputError


def layer(number, auroc=1.0, cosine=0.99, separation=4.0):
    return LayerStatistics(number, 1.0, auroc, separation, cosine, 1.0, 0.0, 1.0, 1.0, 0.5, 0.9, 0.1)


def test_every_good_layer_but_the_first_ones():
    choice = choose_layers([layer(i) for i in range(10)], depth=10)
    assert choice.layers == tuple(range(3, 10))
    assert choice.left_out[0] == "among the first 0.3 of 10 layers"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [({"auroc": 0.89}, "AUROC 0.890"), ({"cosine": 0.7}, "cosine 0.700"), ({"separation": 1.9}, "separation 1.90")],
)
def test_a_bad_layer_ends_the_run_and_is_explained(bad, reason):
    choice = choose_layers([layer(i, **(bad if i == 8 else {})) for i in range(10)], depth=10)
    assert choice.layers == (3, 4, 5, 6, 7)
    assert reason in choice.left_out[8]
    assert choice.left_out[9] == "not in the longest run"


def test_the_later_of_two_runs_of_one_length():
    choice = choose_layers([layer(i, auroc=0.5 if i == 6 else 1.0) for i in range(4, 9)], depth=10)
    assert choice.layers == (7, 8)


def test_runs_go_on_across_layers_that_have_no_direction():
    """Prompts without an image skip the cross-attention layers of Mllama: 8 of 40, as 3, 8, 13, ..."""
    choice = choose_layers([layer(i) for i in range(40) if i % 5 != 3], depth=40)
    assert choice.layers == tuple(i for i in range(12, 40) if i % 5 != 3)
    holed = [layer(i, auroc=0.5 if i == 21 else 1.0) for i in range(40) if i % 5 != 3]
    assert choose_layers(holed, depth=40).layers == tuple(i for i in range(22, 40) if i % 5 != 3)


@pytest.mark.parametrize("least", [{"auroc": 0.9}, {"cosine": 0.8}, {"separation": 2.0}])
def test_what_is_just_enough(least):
    assert choose_layers([layer(i, **(least if i == 8 else {})) for i in range(10)], depth=10).layers == tuple(range(3, 10))


def test_no_layer_is_an_error():
    with pytest.raises(
        InputError, match=r"no decoder layer qualifies: layer 3 by held-out AUROC 0\.600 \(expected 0\.9\), layer 4"
    ):
        choose_layers([layer(i, auroc=0.6) for i in range(10)], depth=10)


def refused(*layers, depth=10):
    with pytest.raises(InputError) as error:
        choose_layers(layers, depth=depth)
    return str(error.value)


def test_what_failed_is_named_layer_by_layer_the_nearest_miss_first():
    said = refused(
        layer(3, cosine=0.2),
        layer(4, auroc=0.5, cosine=0.79),
        layer(5, cosine=0.78),
        layer(6, auroc=0.89),
        layer(7, separation=0.4),
    )
    assert said == (
        "--layers auto: no decoder layer qualifies: layer 6 by held-out AUROC 0.890 (expected 0.9), "
        "layer 5 by split-half cosine 0.780 (expected 0.8), "
        "layer 4 by held-out AUROC 0.500 (expected 0.9) and split-half cosine 0.790 (expected 0.8), "
        "layer 3 by split-half cosine 0.200 (expected 0.8), layer 7 by separation 0.400 (expected 2); "
        "the model may not be aligned, or the calibration rows are too few or too mixed; "
        "give --layers A-B to calibrate all the same."
    )


def test_where_the_halves_of_the_data_disagree_auroc_is_not_blamed():
    said = refused(*(layer(i, auroc=1.0, cosine=0.7 + i / 1000) for i in range(80)), depth=80)
    assert "AUROC" not in said and len(said) < 700
    assert "qualifies: layer 79 by split-half cosine 0.779 (expected 0.8), layer 78 by" in said
    assert "50 more by more, the first 0.3 of 80 layers are never chosen; " in said


def test_only_layers_that_are_never_chosen():
    assert "qualifies: the first 0.3 of 10 layers are never chosen; the" in refused(layer(0), layer(2))


def test_what_was_asked_for_is_said():
    asked = "held-out AUROC >= 0.9, split-half cosine >= 0.8 and separation >= 0.5 of the best layer's (4.00)"
    expected = f"longest run of layers from 0.3 of the depth on with {asked}"
    assert choose_layers([layer(3)], depth=4).criterion == expected


def test_six_layers_are_named_and_no_more_spoken_of():
    assert "more by more" not in refused(*(layer(i, auroc=0.5) for i in range(3, 9)))
    assert "1 more by more" in refused(*(layer(i, auroc=0.5) for i in range(3, 10)))


def test_what_is_not_known_is_not_asked_for_and_the_criterion_says_so():
    choice = choose_layers([layer(i, auroc=None, separation=None, cosine=0.5 if i == 4 else 0.9) for i in range(10)], depth=10)
    assert choice.layers == (5, 6, 7, 8, 9)
    assert "with split-half cosine >= 0.8; not known for lack of harmful rows: held-out AUROC, separation" in choice.criterion
    nothing = choose_layers([layer(i, auroc=None, separation=None, cosine=None) for i in range(10)], depth=10)
    assert nothing.layers == tuple(range(3, 10))
    assert nothing.criterion.startswith("longest run of layers from 0.3 of the depth on; not known")
    with pytest.raises(InputError, match=r"qualifies: layer 3 by split-half cosine 0\.100 \(expected 0\.8\)"):
        choose_layers([layer(i, auroc=None, separation=None, cosine=0.1) for i in range(10)], depth=10)
