"""What runs: the reference runtime."""
