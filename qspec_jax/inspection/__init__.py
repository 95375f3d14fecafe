"""A look inside: what a model is and takes, what this machine runs, and whether its kernels are right."""
