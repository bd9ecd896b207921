"""The port between workers and the aggregator, and its adapters."""
