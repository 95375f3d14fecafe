"""Files as people have them: texts of any encoding, lines of JSON, locks, and writes that are whole or not at all."""
