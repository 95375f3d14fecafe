"""Moves soon."""
