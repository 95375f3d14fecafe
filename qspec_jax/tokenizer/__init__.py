"""Text to token ids and back; knows no file format and no model."""
