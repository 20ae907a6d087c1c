"""Tells what is in a model and what could be saved, without changing it."""
