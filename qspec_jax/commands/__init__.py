"""What the commands share: exit codes, options, files of prompts."""
