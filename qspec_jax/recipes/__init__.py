"""A model in, a 4-bit checkpoint out: recipes, and what they learn from calibration text."""
