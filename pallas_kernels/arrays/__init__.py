"""What the operations read and write: packed weights, integer activations, sums that are not added yet."""
