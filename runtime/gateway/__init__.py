"""HTTP in front of the request path."""
