"""Model architectures as one functional step, and the checkpoints that fill them."""
