"""Demonstrations: collection and store."""
