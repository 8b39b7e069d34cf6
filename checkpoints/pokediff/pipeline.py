from pokediff import PokeDiffPipeline  # for DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
