from __future__ import annotations

import pytest

from exporter.runtime.reading import member


@pytest.mark.parametrize(("value", "found"), [({"a": {"b": 1}}, {"b": 1}), ({}, {}), ({"a": None}, {}), ({"a": [1]}, {})])
def test_the_object_at_a_key(value, found):
    assert member(value, "a") == found
