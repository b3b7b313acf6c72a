"""The toy suite with simulators as slow as real ones, so that rollouts outlast updates."""

from __future__ import annotations

import time

from vlarl_ray.envs.toy import ToyEnv, ToySuite


class SlowToySuite(ToySuite):
    """Toy tasks at 10 ms a step."""

    def make_env(self):
        return _SlowToyEnv(self)


class _SlowToyEnv(ToyEnv):
    def step(self, action):
        time.sleep(0.01)
        return super().step(action)
