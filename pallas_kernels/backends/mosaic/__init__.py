"""Pallas Mosaic GPU (Hopper): shapes and launches, the pipeline of warpgroups, what a thread holds."""
