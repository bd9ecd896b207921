"""Two worked tasks: digits (in scikit-learn, no download) and mnist (files under FEDMQ_DATA)."""
