"""What happened: append-only, classified, redacted events."""
