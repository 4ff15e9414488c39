"""verify_worker.py in a process that has torchvision as the tests have it: `exporter.checkpoint.verify.WORKER` in their place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
import with_torchvision  # noqa: E402, F401 (before transformers)

sys.path.remove(str(TESTS))
runpy.run_path(str(TESTS.parents[1] / "exporter" / "checkpoint" / "verify_worker.py"), run_name="__main__")
