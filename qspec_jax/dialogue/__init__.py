"""A conversation at a terminal: its turns, its commands, its files, and where its lines come from."""
