"""Requests in, results out: the host that keeps a batch busy."""
