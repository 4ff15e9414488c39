"""Modeling code that travels inside exported checkpoints; imports torch and transformers only."""
