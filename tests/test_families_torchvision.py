"""test_families.py on the families whose processors need torchvision, and what only they have: grids, videos, rope deltas."""

from __future__ import annotations

import pytest
from test_families import *  # noqa: F403
from tiny_families_torchvision import FAMILIES, tiny_family


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(request):
    return tiny_family(request.param)
