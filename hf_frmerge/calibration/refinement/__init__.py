"""Refinement of a fitted merge: a short distillation of all its layers together, to each expert on its own prompts."""
