"""FedMQ's tests."""
