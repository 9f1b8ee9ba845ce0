"""The reference model: a small decoder trained on a synthetic support desk."""
