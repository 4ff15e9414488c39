"""Requests, pictures and questions: calibration sets, benchmarks and the demo's world."""
