"""``bench speedup``: where speculation wins, by batch and context."""
