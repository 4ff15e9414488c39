"""Code that travels inside exported checkpoints, word for word; it imports torch, transformers and the standard library."""
