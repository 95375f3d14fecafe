"""Files to tensors under canonical names, into a decoder, and into checkpoints of this library."""
