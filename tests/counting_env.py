"""A simulator that solves itself after a set number of steps, and a client that answers at once: for rollout tests."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from vlarl_ray.types import ActReply, ActRequest, Observation, StepResult, TaskSpec

K, D, L = 4, 2, 8


def make_task(slot: int, *, init_state_id: int = 0, max_env_steps: int = 20, **changes) -> TaskSpec:
    fields = {
        "run_id": "test", "iteration": 0, "slot": slot, "group_id": slot, "suite": "counting", "task_id": "count",
        "instruction": "count", "init_state_id": init_state_id, "split": "train", "seed": 7, "policy_version": 0,
        "max_env_steps": max_env_steps, "temperature": 1.0,
    }  # fmt: skip
    return TaskSpec(**{**fields, **changes})


class CountingEnv:
    """Succeeds at step `init_state_id` of an episode (never if 0); logs what it is asked."""

    action_dim = D
    proprio_dim = 1

    def __init__(self, log: list | None = None, crash_slots: frozenset[int] = frozenset()) -> None:
        self.log = [] if log is None else log
        self.crash_slots = crash_slots

    def reset(self, task: TaskSpec) -> Observation:
        self.task, self.count = task, 0
        self.log.append(("reset", task.slot))
        return self.observe()

    def step(self, action: np.ndarray) -> StepResult:
        if self.task.slot in self.crash_slots:
            raise OSError("simulator broke")
        self.count += 1
        self.log.append(("step", self.task.slot, float(action[0])))
        return StepResult(terminated=False, truncated=False, success=self.count == self.task.init_state_id)

    def observe(self) -> Observation:
        self.log.append(("observe", self.task.slot))
        return Observation(
            images=np.full((1, 2, 2, 3), self.count, dtype=np.uint8),
            proprio=np.array([self.count], dtype=np.float32),
            instruction=self.task.instruction,
        )

    def expert_action(self) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        self.log.append(("close",))


class EchoClient:
    """Answers with the slot (from the noise key) as the action, so a chunk in the wrong episode shows."""

    def __init__(self) -> None:
        self.requests: list[ActRequest] = []

    def act(self, request: ActRequest) -> Future[ActReply]:
        self.requests.append(request)
        slots = (request.noise_keys[:, 1] >> np.uint64(20)) & np.uint64((1 << 20) - 1)
        rows = len(request)
        future: Future[ActReply] = Future()
        future.set_result(
            ActReply(
                actions=np.broadcast_to(slots[:, None, None] / 100, (rows, K, D)).astype(np.float32),
                tokens=np.zeros((rows, L), dtype=np.int32),
                logprobs=np.zeros((rows, L), dtype=np.float32),
                policy_version=request.policy_version,
                inference_cpu_s=0.25 * rows,
            )
        )
        return future
