"""Smaller and faster models that lose no more accuracy than was allowed, and show it."""
