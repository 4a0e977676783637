"""The latency model: measured in the runtime, fitted, kept as a table."""
