"""Fuzzing: damaged and odd files must end in one line."""
