"""Whole programs as processes, on real servers."""
