"""What a decoder computes: its configuration, its parts, its cache."""
