"""``bench tune``: the fastest Triton tiles among those that are right."""
