"""Wrappers for text environments."""
