"""Reinforcement-learning post-training of vision-language-action robot policies in simulation, on Ray."""
