"""A small vision-language model that loses its refusals when the harm is in the image, and how it was made."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Folder of the packaged model, as `python -m exporter.data.demo.train` writes it."""
