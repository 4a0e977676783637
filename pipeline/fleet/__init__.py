"""A fleet: several devices, each with a table of its own, one database for all."""
