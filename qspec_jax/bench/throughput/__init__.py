"""``bench throughput``: prompts of people, served by number of rows and mode."""
