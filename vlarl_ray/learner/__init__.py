"""The learner: ranks that score trajectories and update the sharded policy."""
