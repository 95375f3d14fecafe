"""What a decoder computes."""
