"""Typed values that cross component and process borders: numpy only, frozen, shapes in every docstring.

Letters: S decisions of an episode, K env steps per action chunk, D action dimensions, L action tokens
per decision (K*D, or the codes of a skill), V cameras, P proprioception dimensions, B rows of a batch,
T env steps of an episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8, UInt64

Split = Literal["train", "eval"]

FrameRef = Any
"""Reference to a `u8[S+1, V, H, W, 3]` array: a Ray `ObjectRef`, or the array itself without Ray."""


@dataclass(frozen=True)
class TaskSpec:
    """One episode to run: what, from where, with which randomness and under which weights.

    Identified by `(run_id, iteration, slot)`; everything random in the episode derives from
    `(seed, iteration, slot)`, so it does not matter which worker runs it, nor how often.
    """

    run_id: str
    iteration: int
    slot: int
    """Position in the iteration; results are consumed in slot order, whatever order they arrive in."""
    group_id: int
    """Slots with one `group_id` share task and initial state (one member for PPO)."""
    suite: str
    task_id: str
    instruction: str
    init_state_id: int
    split: Split
    seed: int
    """64-bit seed of the run; training and evaluation use different ones."""
    policy_version: int
    """Oldest version of the weights that may answer (equal to the current one at lag 0)."""
    max_env_steps: int
    temperature: float
    """Sampling temperature; 0 is greedy."""
    max_policy_lag: int = 0
    """Updates after `policy_version` that may answer, too."""
    stop_on_success: bool = True
    """End the episode at its first success; False runs to the horizon (last-step success)."""

    @property
    def identity(self) -> tuple[str, int, int]:
        """`(run_id, iteration, slot)`: two results with one identity are one result."""
        return (self.run_id, self.iteration, self.slot)

    def noise_key(self, decision: int) -> tuple[int, int]:
        """128-bit Philox key of one decision's sampling noise, as two 64-bit words.

        Raises:
            ValueError: If iteration, slot or decision exceed their bit fields (24, 20 and 20 bits).
        """
        fields = (("iteration", self.iteration, 24), ("slot", self.slot, 20), ("decision", decision, 20))
        for name, value, bits in fields:
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name} = {value} does not fit the {bits} bits of a noise key.")
        return (self.seed & (1 << 64) - 1, self.iteration << 40 | self.slot << 20 | decision)


@dataclass(frozen=True)
class Observation:
    """What a policy sees at a decision point."""

    images: UInt8[np.ndarray, "V H W 3"]
    """RGB, upright."""
    proprio: Float32[np.ndarray, " P"]
    instruction: str


@dataclass(frozen=True)
class StepResult:
    """Outcome of one env step; termination, truncation and success are three facts."""

    terminated: bool
    truncated: bool
    success: bool
    """Whether the task is solved in the state reached by this step (not sticky)."""
    reward: float = 0.0
    """The simulator's own reward; training uses `rewards/` instead."""


@dataclass(frozen=True)
class ActionChunk:
    """One decision: K env steps executed open loop."""

    actions: Float32[np.ndarray, "K D"]
    """In env units."""
    tokens: Int32[np.ndarray, " L"] | Float32[np.ndarray, " L"]
    """What was drawn, step-major (K*D): vocabulary ids of action tokens or, of a policy with a continuous head, numbers
    in normalised action units before any clipping. Of a policy that chooses skills, the codes of one."""
    logprobs: Float32[np.ndarray, " L"]
    """Of the drawn tokens or numbers, under the distribution they were drawn from."""
    policy_version: int = -1


@dataclass(frozen=True)
class ActRequest:
    """B observations that want one action chunk each."""

    images: UInt8[np.ndarray, "B V H W 3"]
    proprio: Float32[np.ndarray, "B P"]
    instructions: tuple[str, ...]
    noise_keys: UInt64[np.ndarray, "B 2"]
    """Philox keys (see `TaskSpec.noise_key`); unused where `temperature` is 0."""
    temperature: float
    policy_version: int
    """Oldest acceptable version of the weights; a server with other weights refuses."""
    max_policy_lag: int = 0

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ActReply:
    """Action chunks for the rows of one `ActRequest`, in its order."""

    actions: Float32[np.ndarray, "B K D"]
    tokens: Int32[np.ndarray, "B L"] | Float32[np.ndarray, "B L"]
    """See `ActionChunk.tokens`."""
    logprobs: Float32[np.ndarray, "B L"]
    policy_version: int
    inference_cpu_s: float = 0.0
    """CPU seconds of the forward passes that produced this reply (its share of the batch)."""
    tokens_of_chunk: bool = False
    """Whether tokens say what the chunk is as a whole; else each belongs to one of its env steps."""


@dataclass(frozen=True)
class EpisodeTiming:
    """CPU seconds an episode cost its worker, by part; sums over episodes give the time split."""

    reset_s: float = 0.0
    physics_s: float = 0.0
    render_s: float = 0.0
    inference_s: float = 0.0
    """CPU seconds spent by the server on this episode's decisions."""


@dataclass(frozen=True)
class Trajectory:
    """One finished episode. Numbers travel by value, frames by reference."""

    task: TaskSpec
    frames: FrameRef
    """`u8[S+1, V, H, W, 3]`; entry S is the observation after the last executed env step."""
    proprio: Float32[np.ndarray, "S1 P"]
    tokens: Int32[np.ndarray, "S L"] | Float32[np.ndarray, "S L"]
    """See `ActionChunk.tokens`."""
    behaviour_logprobs: Float32[np.ndarray, "S L"]
    policy_versions: Int32[np.ndarray, " S"]
    rewards: Float32[np.ndarray, "S K"]
    """Per env step; zero where a step of the chunk was not executed."""
    num_env_steps: Int32[np.ndarray, " S"]
    """Env steps executed of each chunk, 1..K; below K only where the episode ended inside it."""
    executed_actions: Float32[np.ndarray, "S K D"]
    """What the simulator received (after clipping to its bounds), env units; zero where not executed."""
    terminated: bool
    truncated: bool
    success: bool
    """Success at any env step."""
    success_at_last_step: bool
    first_success_env_step: int | None
    """1-based index of the first successful env step."""
    worker: int = -1
    timing: EpisodeTiming = field(default_factory=EpisodeTiming)
    tokens_of_chunk: bool = False
    """See `ActReply.tokens_of_chunk`."""

    @property
    def num_decisions(self) -> int:
        """S."""
        return len(self.num_env_steps)

    @property
    def total_env_steps(self) -> int:
        """Env steps executed in the episode."""
        return int(self.num_env_steps.sum())

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of rewards."""
        return float(self.rewards.sum())

    def executed_mask(self) -> Bool[np.ndarray, "S K"]:
        """True for the env steps of each chunk that were executed."""
        return np.arange(self.rewards.shape[1])[None, :] < self.num_env_steps[:, None]

    def token_mask(self) -> Bool[np.ndarray, "S L"]:
        """True for action tokens whose env step was executed; or any env step, where they are of the chunk."""
        return spread_mask(self.executed_mask(), self.tokens.shape[1], of_chunk=self.tokens_of_chunk)


@dataclass(frozen=True)
class TrajectoryGroup:
    """Trajectories that share one task and initial state, in slot order (one member for PPO)."""

    trajectories: tuple[Trajectory, ...]

    @property
    def returns(self) -> Float32[np.ndarray, " G"]:
        """Undiscounted return of each member."""
        return np.array([t.episode_return for t in self.trajectories], dtype=np.float32)


@dataclass(frozen=True)
class Scores:
    """What the learner's current weights say of one trajectory; None for what was not asked."""

    values: Float32[np.ndarray, " S1"] | None
    """Of the S+1 observations; `values[S]` bootstraps a truncated episode."""
    logprobs: Float32[np.ndarray, "S L"] | None


@dataclass(frozen=True)
class StoredEpisode:
    """A successful episode of S decisions, ending at its first success."""

    key: str
    """Unique in the run; files are named after it."""
    task_id: str
    instruction: str
    frames: FrameRef
    """`u8[>=S, V, H, W, 3]`: what was seen at each decision."""
    proprio: Float32[np.ndarray, "S P"]
    actions: Float32[np.ndarray, "S K D"]
    """Executed (clipped) actions, env units."""
    num_env_steps: Int32[np.ndarray, " S"]
    """Env steps of each chunk that lie before the end of the episode; the others are never cloned."""
    length: int
    """Env steps to success."""
    pinned: bool = False
    """Never evicted (a seeded demonstration, where the config says so)."""

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory) -> StoredEpisode:
        """Cut a successful trajectory at its first success, so that what followed does not count.

        Raises:
            ValueError: If it was not successful.
        """
        length = trajectory.first_success_env_step
        if length is None:
            raise ValueError("only successful episodes are stored.")
        ends = np.cumsum(trajectory.num_env_steps)
        num_decisions = int(np.searchsorted(ends, length)) + 1
        steps = trajectory.num_env_steps[:num_decisions].copy()
        steps[-1] -= ends[num_decisions - 1] - length
        task = trajectory.task
        return cls(
            key="-".join(str(part) for part in (task.iteration, task.slot)),
            task_id=task.task_id,
            instruction=task.instruction,
            frames=trajectory.frames,
            proprio=trajectory.proprio[:num_decisions],
            actions=trajectory.executed_actions[:num_decisions],
            num_env_steps=steps,
            length=length,
        )


@dataclass(frozen=True)
class DemoRows:
    """M decisions of stored episodes, to be cloned."""

    frames: tuple[FrameRef, ...]
    """One reference per episode."""
    instructions: tuple[str, ...]
    """One per episode."""
    episode_index: Int32[np.ndarray, " M"]
    decision_index: Int32[np.ndarray, " M"]
    proprio: Float32[np.ndarray, "M P"]
    actions: Float32[np.ndarray, "M K D"]
    """Executed actions, env units; the learner turns them into tokens."""
    action_mask: Bool[np.ndarray, "M K"]
    """False for env steps behind the end of the episode."""

    def __len__(self) -> int:
        return len(self.episode_index)


@dataclass(frozen=True)
class TrainBatch:
    """One row per decision. Every learner rank holds all numbers and pulls only the frames of its rows."""

    frames: tuple[FrameRef, ...]
    """One reference per trajectory."""
    instructions: tuple[str, ...]
    """One per trajectory."""
    trajectory_index: Int32[np.ndarray, " B"]
    decision_index: Int32[np.ndarray, " B"]
    proprio: Float32[np.ndarray, "B P"]
    action_tokens: Int32[np.ndarray, "B L"] | Float32[np.ndarray, "B L"]
    """See `ActionChunk.tokens`."""
    token_mask: Bool[np.ndarray, "B L"]
    """False for tokens of env steps that were never executed (see `Trajectory.token_mask`)."""
    old_logprobs: Float32[np.ndarray, "B L"]
    """Reference of the ratio, frozen for the whole update."""
    advantages: Float32[np.ndarray, " B"]
    returns: Float32[np.ndarray, " B"]
    """Value targets."""
    old_values: Float32[np.ndarray, " B"]
    weights: Float32[np.ndarray, " B"]
    """Of the policy loss: length normalisation (1 under `token_mean`) times truncated importance weights, where the
    learner's log-probabilities are the reference."""
    num_actions_per_decision: int
    """K, to split L tokens into K actions where each belongs to one."""
    temperature: float
    policy_version: int
    """Version of the weights that are about to be updated."""
    progress: float = 0.0
    """Share of the run's iterations that lie behind, 0 to 1; learning rates may follow it."""
    policy_weight: float = 1.0
    """Weight of the surrogate in the loss."""
    demos: DemoRows | None = None
    """What to clone besides, in as many minibatches as the rest; None where nothing is cloned."""
    bc_weight: float = 0.0
    """Weight of the cloning loss."""

    def __len__(self) -> int:
        return len(self.trajectory_index)


def spread_mask(
    executed: Bool[np.ndarray, "S K"], num_tokens: int, *, of_chunk: bool = False
) -> Bool[np.ndarray, "S L"]:
    """Say which tokens count, from which env steps were executed.

    Args:
        executed: Of each chunk.
        num_tokens: L of a chunk; a multiple of K unless `of_chunk`.
        of_chunk: Whether tokens are of the chunk as a whole: then all of them count once it was begun.

    Raises:
        ValueError: If tokens cannot be shared out among env steps.

    Example:
        >>> spread_mask(np.array([[True, False]]), 4).tolist()
        [[True, True, False, False]]
        >>> spread_mask(np.array([[True, False]]), 3, of_chunk=True).tolist()
        [[True, True, True]]
    """
    if of_chunk:
        return np.repeat(executed.any(axis=1, keepdims=True), num_tokens, axis=1)
    if num_tokens % executed.shape[1]:
        raise ValueError(
            f"{num_tokens} tokens cannot be shared out among {executed.shape[1]} env steps; if they are of the chunk "
            "as a whole, set tokens_of_chunk."
        )
    return np.repeat(executed, num_tokens // executed.shape[1], axis=1)


def concatenate_rows(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Join per-trajectory arrays along the row axis."""
    return np.concatenate(list(arrays), axis=0)
