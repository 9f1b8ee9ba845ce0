"""What is run again: recorded runs under pinned or changed conditions."""
