"""Training pruned networks, masks fixed or growing."""
