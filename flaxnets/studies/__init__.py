"""Studies: their configs, directories and runs, and restoring trained networks."""
