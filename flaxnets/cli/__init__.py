"""What the commands share: arguments, interruption, progress, exit status."""
