"""Everything run around the system: commands, the simulator, the demo, private servers, benchmarks."""
