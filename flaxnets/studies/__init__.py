"""What a study is: its configs, its directory, its runs, and restoring them."""
