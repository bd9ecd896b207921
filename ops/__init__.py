"""Everything run around the system: commands, the embedded demo, private servers, benchmarks."""
