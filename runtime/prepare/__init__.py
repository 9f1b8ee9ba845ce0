"""The nine preparation stages, one file a stage."""
