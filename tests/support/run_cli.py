"""The command line in a process of its own, with the image processors that the tests' own process has."""

from pathlib import Path

import with_torchvision  # noqa: F401 (before transformers, which looks for torchvision once)

from exporter.checkpoint import verify
from exporter.cli.commands import main

verify.WORKER = Path(__file__).with_name("worker_forked.py")
main(prog_name="shiftdc-export")
