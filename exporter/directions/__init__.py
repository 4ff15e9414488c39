"""Safety directions and shifts, measured on the base model."""
