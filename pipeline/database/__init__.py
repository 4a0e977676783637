"""The database: every layer's weights at every level."""
