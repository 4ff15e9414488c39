"""What benchmarks share: models of random weights, and ways measured side by side."""
