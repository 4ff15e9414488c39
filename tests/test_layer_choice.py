from __future__ import annotations

import pytest

from exporter.directions import LayerStatistics
from exporter.errors import InputError
from exporter.layer_choice import choose_layers


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


def test_no_layer_is_an_error():
    with pytest.raises(InputError, match=r"no decoder layer separates.*AUROC 0\.60"):
        choose_layers([layer(i, auroc=0.6) for i in range(10)], depth=10)


def test_what_is_not_known_is_not_asked_for_and_the_criterion_says_so():
    choice = choose_layers([layer(i, auroc=None, separation=None, cosine=0.5 if i == 4 else 0.9) for i in range(10)], depth=10)
    assert choice.layers == (5, 6, 7, 8, 9)
    assert "with split-half cosine >= 0.8; not known for lack of harmful rows: held-out AUROC, separation" in choice.criterion
    nothing = choose_layers([layer(i, auroc=None, separation=None, cosine=None) for i in range(10)], depth=10)
    assert nothing.layers == tuple(range(3, 10))
    assert nothing.criterion.startswith("longest run of layers from 0.3 of the depth on; not known")
    with pytest.raises(InputError, match="no decoder layer gives one direction for two halves of the rows"):
        choose_layers([layer(i, auroc=None, separation=None, cosine=0.1) for i in range(10)], depth=10)
