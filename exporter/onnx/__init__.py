"""ONNX graphs of an export; `runner` and what it imports need no torch."""
