"""The sub-commands of `replay`, one a file; each is imported only when it is called."""
