"""A fleet of any size in one process and virtual time."""
