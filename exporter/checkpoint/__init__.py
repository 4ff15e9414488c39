"""Exports on disk: written, opened, verified, replaced."""
