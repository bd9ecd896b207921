"""What workers and the aggregator both speak, and the two ports with their adapters."""
