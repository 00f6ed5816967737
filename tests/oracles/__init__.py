"""Slow, obvious reference implementations. Nothing here imports the package under test."""
