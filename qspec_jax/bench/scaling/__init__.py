"""What a model would take on many devices, by formula."""
