"""The command line in a process of its own, with the image processors that the tests' own process has."""

import with_torchvision  # noqa: F401 (before transformers, which looks for torchvision once)

from exporter.cli.commands import main

main(prog_name="shiftdc-export")
