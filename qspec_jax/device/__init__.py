"""The machine: what fits its memory, and compiled programs kept on disk."""
