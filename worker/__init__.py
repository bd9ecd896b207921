"""Trains on data that never leaves the device and publishes one compressed update at a time."""
