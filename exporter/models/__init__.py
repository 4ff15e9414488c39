"""The base model: its files, recipe, processor, prompts, and the loaded model itself."""
