"""The algorithm on the device: draft, verify, accept; sampling; compiled programs."""
