"""Tasks of the experiments; not built in."""
