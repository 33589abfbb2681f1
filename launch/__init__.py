"""The commands of the `openv4` console script."""
