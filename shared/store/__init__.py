"""The port to the versions of the model and the aggregation's state, and its adapters."""
