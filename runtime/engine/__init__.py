"""The engine: scheduler, paged cache, sampling, and the plans they leave behind."""
