"""Training: the stages of a cascade, distillation, recipes."""
