"""What is measured: run as `python -m benchmarks.speed.replies`, from the repository's folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))  # tiny models, and a Hub of our own
