"""In which portions does the batch-invariant step gather context and ask queries?  Two numbers that kernels see."""

COLUMNS = 64
"""The gathered context is a multiple of this: kernels sum in blocks, and a whole unused block adds exact zeros."""
TILE = 16
"""Queries of one attention call are a multiple of this: one query alone takes another kernel than many."""


def columns_for(positions: int) -> int:
    """Return the gathered columns that hold so many positions."""
    return -(-positions // COLUMNS) * COLUMNS
