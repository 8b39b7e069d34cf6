"""The older systems that pokediff is compared with (docs/baselines.md): one interface, one training loop."""
