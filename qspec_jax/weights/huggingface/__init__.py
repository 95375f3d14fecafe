"""Directories of Hugging Face transformers: safetensors, and the 4-bit formats found in them."""
