"""A policy of some hundred parameters behind the model interface, and random episodes for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vlarl_ray.config import AlgorithmConfig, LearnerConfig, LoraConfig, ModelConfig, TowerConfig
from vlarl_ray.models import new_policy
from vlarl_ray.models.action_tokens import action_logprobs
from vlarl_ray.models.base import PolicyInputs, PolicyOutput, VLAModel
from vlarl_ray.models.distributions import TokenDistribution, standard_noise
from vlarl_ray.models.lora import CRITIC, adapters_disabled, attach_lora, use_adapter
from vlarl_ray.types import TaskSpec, Trajectory, TrajectoryGroup

NUM_BINS, PROMPT_LENGTH, PROPRIO = 8, 6, 3
INSTRUCTIONS = ("reach", "push it", "close drawer")


class TinyVLA(VLAModel):
    """Mean colour, mean prompt embedding and proprioception through two layers, to all action positions at once."""

    num_bins = NUM_BINS
    first_action_token = 40

    def __init__(self, *, chunk_length: int = 2, action_dim: int = 3, width: int = 13, seed: int = 0) -> None:
        super().__init__()
        self.chunk_length, self.action_dim = chunk_length, action_dim
        self.num_action_tokens = chunk_length * action_dim
        self.critic, self.detach_value = "shared", False
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(32, width)
            self.project = nn.Linear(3 + PROPRIO, width)
            self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
            self.queries = nn.Parameter(torch.randn(self.num_action_tokens, width))
            self.lm_head = nn.Linear(width, NUM_BINS, bias=False)
            self.value_head = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 1))

    def encode_prompts(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(instructions), PROMPT_LENGTH, dtype=torch.int64)
        lengths = torch.tensor([min(len(text), PROMPT_LENGTH) for text in instructions])
        for row, text in enumerate(instructions):
            for column, char in enumerate(text[:PROMPT_LENGTH]):
                ids[row, column] = ord(char) % 32
        return ids, lengths

    def forward(self, inputs: PolicyInputs, tokens: Tensor | None = None) -> PolicyOutput:
        hidden = self._hidden(inputs)
        logits = self.lm_head(torch.tanh(hidden[:, None] + self.queries)).float()
        if self.critic == "separate":
            with use_adapter(self, CRITIC):
                hidden = self._hidden(inputs)
        hidden = hidden.detach() if self.detach_value else hidden
        return PolicyOutput(
            TokenDistribution(logits, self.first_action_token), self.value_head(hidden.float()).squeeze(-1)
        )

    def _hidden(self, inputs: PolicyInputs) -> Tensor:
        dtype = self.queries.dtype
        pixels = inputs.images.float().mean(dim=(1, 2, 3)) / 255
        real = torch.arange(PROMPT_LENGTH, device=pixels.device) < inputs.prompt_lengths[:, None]
        text = (self.embed(inputs.prompt_ids) * real[..., None]).sum(1) / inputs.prompt_lengths[:, None]
        hidden = self.project(torch.cat([pixels, inputs.proprio.float()], -1).to(dtype)) + text.to(dtype)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return hidden

    def draw_noise(self, keys: np.ndarray) -> Tensor:
        return torch.from_numpy(standard_noise("tokens", keys, (self.num_action_tokens, NUM_BINS)))

    def sample(self, inputs: PolicyInputs, *, temperature: float, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self(inputs).actions.logits
        scaled = logits / temperature + noise if temperature > 0 else logits
        columns = scaled.argmax(-1)
        return columns + self.first_action_token, action_logprobs(logits, columns, temperature=temperature)

    def decode_actions(self, tokens: Tensor) -> Tensor:
        return (tokens - self.first_action_token).float().view(-1, self.chunk_length, self.action_dim)

    def encode_actions(self, actions: Tensor) -> Tensor:
        return actions.flatten(1).long() + self.first_action_token

    def fsdp_units(self) -> Iterator[nn.Module]:
        yield from self.layers
        yield self.value_head

    def adapters_disabled(self) -> AbstractContextManager[None]:
        return adapters_disabled(self)

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def tiny_model(cfg: LearnerConfig, *, seed: int = 0) -> TinyVLA:
    """Build the model, with adapters where the config wants them."""
    model = TinyVLA(seed=seed)
    if cfg.train == "lora":
        attach_lora(model, cfg.lora, seed=1, critic=cfg.critic, detach_value=cfg.detach_value)
    return model


def small_openvla(cfg: LearnerConfig, *, seed: int = 0, **changes: object) -> VLAModel:
    """Build the real architecture, as small as it goes, for the same chunks and instructions."""
    tower = TowerConfig(dim=16, depth=2, num_heads=2, mlp_dim=16)
    settings: dict = {
        "image_size": 16,
        "dino": tower,
        "siglip": tower,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "action_dim": 3,
        "chunk_length": 2,
        "value_hidden_sizes": (8,),
        **changes,
    }
    model = new_policy(ModelConfig(**settings), INSTRUCTIONS, seed)
    model.detach_value = cfg.detach_value
    if cfg.train == "lora":
        attach_lora(model, cfg.lora, seed=1, critic=cfg.critic, detach_value=cfg.detach_value)
    return model


def learner_config(**changes: object) -> LearnerConfig:
    """Small settings: rank 3 is divisible by nothing, so shards are uneven; every layer is gathered by itself."""
    settings: dict = {"lora": LoraConfig(rank=3, alpha=6.0), "micro_batch_size": 5, "device": "cpu", **changes}
    return LearnerConfig(**{"fsdp_min_params": 0, **settings})


def algorithm_config(**changes: object) -> AlgorithmConfig:
    settings: dict = {"critic_warmup_updates": 0, "num_epochs": 2, "num_minibatches": 2, **changes}
    return AlgorithmConfig(**settings)


def make_task(
    *, slot: int = 0, instruction: str = "reach", temperature: float = 1.0, max_env_steps: int = 40
) -> TaskSpec:
    return TaskSpec(
        run_id="test",
        iteration=0,
        slot=slot,
        group_id=slot,
        suite="toy",
        task_id=instruction,
        instruction=instruction,
        init_state_id=slot,
        split="train",
        seed=0,
        policy_version=0,
        max_env_steps=max_env_steps,
        temperature=temperature,
    )


def make_trajectories(
    lengths: Sequence[int], *, model: VLAModel | None = None, seed: int = 0, temperature: float = 1.0
) -> list[Trajectory]:
    """Random episodes of the given numbers of decisions, alternately terminated and truncated.

    Behaviour log-probabilities are those of `model` (a fresh one without it) for the random tokens.
    """
    model = model or TinyVLA()
    rng = np.random.default_rng(seed)
    chunk, dims = model.chunk_length, model.action_dim
    trajectories = []
    for slot, length in enumerate(lengths):
        terminated = slot % 2 == 0
        steps = np.full(length, chunk, np.int32)
        steps[-1] = rng.integers(1, chunk + 1)
        rewards = np.zeros((length, chunk), np.float32)
        rewards[-1, steps[-1] - 1] = float(terminated)
        instruction = INSTRUCTIONS[slot % 3]
        frames = rng.integers(0, 256, (length + 1, 1, 4, 4, 3), dtype=np.uint8)
        proprio = rng.standard_normal((length + 1, PROPRIO)).astype(np.float32)
        tokens = (rng.integers(0, NUM_BINS, (length, chunk * dims)) + model.first_action_token).astype(np.int32)
        ids, lens = model.encode_prompts([instruction] * length)
        inputs = PolicyInputs(torch.from_numpy(frames[:-1]), ids, lens, torch.from_numpy(proprio[:-1]))
        with torch.no_grad():
            taken = torch.from_numpy(tokens.astype(np.int64))
            columns = taken - model.first_action_token
            logprobs = action_logprobs(model(inputs, taken).actions.logits, columns, temperature=temperature).numpy()
        trajectories.append(
            Trajectory(
                task=make_task(slot=slot, instruction=instruction, temperature=temperature),
                frames=frames,
                proprio=proprio,
                tokens=tokens,
                behaviour_logprobs=logprobs,
                policy_versions=np.zeros(length, np.int32),
                rewards=rewards,
                num_env_steps=steps,
                executed_actions=np.zeros((length, chunk, dims), np.float32),
                terminated=terminated,
                truncated=not terminated,
                success=terminated,
                success_at_last_step=terminated,
                first_success_env_step=int(steps.sum()) if terminated else None,
            )
        )
    return trajectories


def as_groups(trajectories: Sequence[Trajectory]) -> list[TrajectoryGroup]:
    return [TrajectoryGroup((trajectory,)) for trajectory in trajectories]
