"""The ten request stages, one file a stage."""
