from pokediff import PokeDiffPipeline  # noqa: F401 (DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))
