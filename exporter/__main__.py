"""`python -m exporter`, for torchrun."""

from exporter.cli.commands import main

main(prog_name="shiftdc-export")
