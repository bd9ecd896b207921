"""One suite per port over every adapter, and what real servers add to it."""
