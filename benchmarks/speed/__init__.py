"""How long it takes, as a ratio side by side in one run; the README's table of speed."""
