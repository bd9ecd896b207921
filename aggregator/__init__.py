"""Consumes updates, weighs each by its staleness, averages, stores model versions."""
