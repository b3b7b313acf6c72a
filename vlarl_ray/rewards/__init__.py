"""Rewards of trajectories."""
