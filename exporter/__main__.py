"""`python -m exporter`, for torchrun."""

from exporter.cli import main

main(prog_name="shiftdc-export")
