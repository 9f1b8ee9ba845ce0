"""What was pinned: frozen, content-addressed descriptions of a run."""
