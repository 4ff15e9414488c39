"""worker_with_torchvision.py in a forked interpreter: `exporter.checkpoint.verify.WORKER` where the process is not the matter."""

import os
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
sys.path.insert(0, str(SUPPORT))
from interpreters_client import main  # noqa: E402

WORKER = SUPPORT.parents[1] / "exporter" / "checkpoint" / "verify_worker.py"
#: What that imports, and what loading any model with it does; nothing of a checkpoint, and nothing of the package.
IMPORTS = f"""
import runpy, sys
sys.path.insert(0, {str(SUPPORT)!r})
import with_torchvision
sys.path.remove({str(SUPPORT)!r})
runpy.run_path({str(WORKER)!r}, run_name="imports")
"""

if __name__ == "__main__":
    os._exit(main("-I", IMPORTS, str(SUPPORT / "worker_with_torchvision.py"), *sys.argv[1:]))
