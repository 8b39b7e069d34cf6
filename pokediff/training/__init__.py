"""Training: the stages of a cascade, distillation, preferences, recipes."""
