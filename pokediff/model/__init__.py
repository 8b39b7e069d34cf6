"""The model: denoisers, noise schedule and loss, text encoder, pipeline."""
