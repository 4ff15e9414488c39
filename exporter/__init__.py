"""Measure and remove safety perception distortion in vision-language models (ShiftDC, arXiv:2502.13095)."""

__version__ = "0.1.0"
