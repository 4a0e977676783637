"""The search for the level of each layer."""
