"""GGUF files (llama.cpp): tensors, metadata, and the tokenizer inside."""
