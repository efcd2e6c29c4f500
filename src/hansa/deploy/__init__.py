"""A federation past one machine: every organisation with a folder and a command of its own."""
