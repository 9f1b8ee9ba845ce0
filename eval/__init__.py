"""What it means: pure functions from recorded runs to findings."""
