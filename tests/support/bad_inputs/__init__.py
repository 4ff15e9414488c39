"""Inputs that are wrong, each with the words that its sentence must hold: the place and the mend."""

from bad_inputs import checkpoints, lines, options, pictures, recipes
from bad_inputs.workshop import Case, Workshop

CASES: list[Case] = [*recipes.CASES, *lines.CASES, *pictures.CASES, *checkpoints.CASES, *options.CASES]

__all__ = ["CASES", "Case", "Workshop"]
