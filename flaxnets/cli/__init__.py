"""Shared code of the commands: arguments, interruption, progress, exit status."""
