"""The floors hold, and our names are ours."""
