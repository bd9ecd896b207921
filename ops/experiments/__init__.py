"""Experiments: one file each for `fedmq simulate compare`, what they show in README.md."""
