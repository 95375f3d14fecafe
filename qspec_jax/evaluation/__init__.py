"""How good a model is: scores of texts and drafts, lm-eval, conversations to ask."""
