"""Bring your own simulator: a point mass that must stop at a cross.

Two classes are all there is: a suite that numbers initial states, and a simulator that runs one episode at a time.

    vlarl train my_job.yaml --env.suite examples.my_simulator:MySuite --env.tasks '["stop"]' --model.action_dim 2
"""

import numpy as np

from vlarl_ray.types import Observation, StepResult


class MySuite:
    """Initial states `0..n-1` per split; `settings` are the fields of `env` in the job, then those of `env.options`."""

    name, proprio_dim = "my-simulator", 4

    def __init__(self, tasks, *, image_size=64, train_seed=42, eval_seed=1042, num_states=50, **settings):
        self.task_ids, self.image_size = tuple(tasks), image_size
        seeds = {"train": train_seed, "eval": eval_seed}
        self.states = {
            split: np.random.default_rng(s).uniform(-0.9, 0.9, (num_states, 4)) for split, s in seeds.items()
        }

    def instruction(self, task_id):
        return "stop at the cross"

    def num_init_states(self, task_id, split):
        return len(self.states[split])

    def init_state_hash(self, task_id, split, init_state_id):
        return self.states[split][init_state_id].tobytes().hex()

    def make_env(self):
        return PointMass(self)


class PointMass:
    """A mass in [-1, 1]^2 that actions accelerate."""

    action_dim, proprio_dim = 2, 4

    def __init__(self, suite):
        self.suite = suite

    def reset(self, task):
        self.instruction = task.instruction
        self.position, self.goal = np.split(self.suite.states[task.split][task.init_state_id].copy(), 2)
        self.velocity = np.zeros(2)
        return self.observe()

    def step(self, action):
        self.velocity = 0.9 * self.velocity + 0.02 * np.clip(action, -1, 1)
        self.position = np.clip(self.position + self.velocity, -1, 1)
        near, slow = np.abs(self.goal - self.position).max() < 0.1, np.abs(self.velocity).max() < 0.03
        return StepResult(terminated=False, truncated=False, success=bool(near and slow))

    def observe(self):
        image = np.zeros((1, self.suite.image_size, self.suite.image_size, 3), np.uint8)
        for channel, point in ((0, self.position), (1, self.goal)):
            x, y = ((point + 1) / 2 * (self.suite.image_size - 5)).astype(int)
            image[0, y : y + 5, x : x + 5, channel] = 255
        proprio = np.concatenate([self.position, self.velocity]).astype(np.float32)
        return Observation(images=image, proprio=proprio, instruction=self.instruction)

    def expert_action(self):
        return np.clip(8 * (self.goal - self.position) - 50 * self.velocity, -1, 1).astype(np.float32)

    def close(self):
        pass
