"""What is seen: read-only pages over a ledger."""
