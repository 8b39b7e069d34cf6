"""Measure a generator, or a folder of pictures with their prompts: `evaluate(config)` in evaluate.py."""
