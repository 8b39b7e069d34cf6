"""What a model is: denoisers, the noise schedule and the loss, the text encoder, the pipeline."""
