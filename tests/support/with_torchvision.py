"""Makes torchvision importable in this process, for processors that need it; import before transformers.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators do not load, and then its import fails,
and transformers' with it. So `make test` puts it into a folder of its own, which nothing but the tests sees. What the
processors use is plain torch; two operators must be declared for the import to succeed.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "test-only"

if find_spec("torchvision") is None:
    sys.path.append(str(FOLDER))
    # the declarations go with this object
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402, F401 (here and not later, so that a missing one ends in an error, never in skipped tests)
