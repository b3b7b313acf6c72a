"""Every knob of a run: one frozen dataclass per component, each field with a sentence. Loads neither torch nor ray."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from vlarl_ray.preprocessing_config import PreprocessingConfig

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class EnvConfig:
    """Simulator, tasks and cameras."""

    suite: str = "metaworld"
    """Registered suite name, or `my_package.my_env:MySuite`."""
    tasks: tuple[str, ...] = ("drawer-close-v3", "window-open-v3", "button-press-topdown-v3")
    """Task ids to train and evaluate on; `mt10` and `mt50` stand for Meta-World's sets."""
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    """Side of the square camera image, pixels."""
    camera: str | tuple[str, ...] = "corner2"
    """Camera name, or a list of them: an observation has a frame of each, in this order, the primary camera's first."""
    render_profile: Literal["fast", "full"] = "fast"
    """`fast` drops shadows, reflections, multisampling and fine meshes (13-16x cheaper); recorded with the data."""
    gl_backend: Literal["auto", "egl", "osmesa"] = "auto"
    """Headless OpenGL: `auto` takes EGL where a device works, else OSMesa."""
    max_env_steps: Annotated[int, Field(ge=1, le=10_000)] = 160
    """Env steps after which an episode is truncated (value bootstrapped, not terminated)."""
    train_seed: NonNegative = 42
    """Seed of the task set that training goals come from."""
    eval_seed: NonNegative = 1042
    """Seed of the task set that held-out goals come from; equal goals are removed from training."""
    assets: str | None = None
    """LIBERO: folder of its assets (scenes, textures, objects); None looks where LIBERO itself does."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the suite; those of suites of your own, too."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras, also where there is one."""
        return (self.camera,) if isinstance(self.camera, str) else self.camera


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class DemosConfig:
    """Scripted-expert demonstrations for the warm start."""

    path: str | None = None
    """Existing demonstration store (folder of Parquet files); None collects into the run folder."""
    episodes_per_task: Positive = 10
    """Successful episodes to collect for each task."""
    action_noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise added to the expert's actions in [-1, 1] units."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class TowerConfig:
    """One vision transformer."""

    dim: Positive = 64
    """Width."""
    depth: Annotated[int, Field(ge=2)] = 3
    """Blocks; the feature is the output of the second-to-last, the last is not computed."""
    num_heads: Positive = 4
    """Attention heads."""
    mlp_dim: Positive = 256
    """Width of the feed-forward layer."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class OFTConfig:
    """What OpenVLA-OFT has beyond OpenVLA; for openvla_oft."""

    num_cameras: Positive = 1
    """Frames per observation, as many as `env.camera` names; the primary camera's first."""
    passes: Literal["one", "two"] = "one"
    """`one`: everything sees everything (OpenVLA-OFT). `two`: the prompt does not see what follows it (RIPT-VLA)."""
    detach_prompt: bool = False
    """With two passes: no gradient through the prompt's, as in RIPT-VLA; saves memory, but the towers learn nothing."""
    stop_token_id: NonNegative = 2
    """Text id after the placeholders of the actions."""
    head_width: Positive | None = None
    """Width of the action and scale heads; None takes `hidden_size`, as published."""
    num_head_blocks: NonNegative = 2
    """Residual blocks of the action and scale heads."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class QuestConfig:
    """QueST policy (architecture `quest`): skill autoencoder, skill prior, observation encoders; a laptop size."""

    cameras: tuple[str, ...] = ("image",)
    """Names of the cameras, in the order of an observation's frames."""
    lowdim: tuple[tuple[str, Positive], ...] = ()
    """Names and sizes of what proprioception holds, in order; the sizes add up to `model.proprio_dim`."""
    task_encoding: Literal["vector", "embedding"] = "vector"
    """An instruction is a given vector (CLIP's, say) behind a linear layer, or a learned row."""
    task_size: Positive = 64
    """Size of the vector, or number of rows."""
    image_embed_dim: Positive = 64
    """Features of each camera; an even number."""
    lowdim_embed_dim: Positive = 32
    """Features of each entry of `lowdim`."""
    lowdim_hidden_sizes: tuple[Positive, ...] = ()
    """Hidden widths of those encoders (ReLU MLP); none makes them linear, as in QueST."""
    block_length: Positive = 16
    """Actions that a skill stands for; the first `model.chunk_length` of them are executed."""
    conv_kernels: tuple[Positive, ...] = (5, 3, 3)
    """Kernel sizes of the autoencoder's convolutions over time."""
    conv_strides: tuple[Positive, ...] = (2, 2, 1)
    """Their strides; a skill has `block_length` over their product codes."""
    fsq_levels: tuple[Annotated[int, Field(ge=2)], ...] = (8, 5, 5, 5)
    """Levels of each dimension of the quantiser; their product is the number of codes to choose from."""
    autoencoder_dim: Positive = 64
    """Width of the autoencoder; a multiple of 8 and of its numbers of heads."""
    encoder_layers: Positive = 2
    """Layers of its encoder."""
    encoder_heads: Positive = 4
    """Attention heads of its encoder."""
    decoder_layers: Positive = 2
    """Layers of its decoder."""
    decoder_heads: Positive = 4
    """Attention heads of its decoder."""
    prior_dim: Positive = 96
    """Width of the prior; an even number and a multiple of `prior_heads`."""
    prior_layers: Positive = 3
    """Layers of the prior."""
    prior_heads: Positive = 4
    """Attention heads of the prior."""
    prior_vocab_size: Positive | None = None
    """Outputs of the prior; None has one per code. Those beyond the codes are never drawn."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of autoencoder and prior while they are fine-tuned; none in RL."""

    @property
    def num_codes(self) -> int:
        """Codes of a skill."""
        return self.block_length // math.prod(self.conv_strides)

    @property
    def codebook_size(self) -> int:
        """Codes to choose from at each position."""
        return math.prod(self.fsq_levels)


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ModelConfig:
    """OpenVLA-shaped policy; the defaults are the laptop size, about a million parameters."""

    architecture: str = "openvla"
    """Registered model name, or `my_package.my_model:MyModel`."""
    image_size: Annotated[int, Field(ge=8)] = 64
    """Side the model expects; frames of another size are resized."""
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    """From camera frames to pixels."""
    patch_size: Positive = 8
    """Side of a vision patch, pixels."""
    num_register_tokens: NonNegative = 4
    """Register tokens of the DINOv2 tower."""
    dino: TowerConfig = field(default_factory=TowerConfig)
    """DINOv2-with-registers tower."""
    siglip: TowerConfig = field(default_factory=TowerConfig)
    """SigLIP tower."""
    hidden_size: Positive = 128
    """Llama width."""
    intermediate_size: Positive = 256
    """Llama feed-forward width."""
    num_layers: Positive = 4
    """Llama decoder layers."""
    num_heads: Positive = 4
    """Llama attention heads."""
    num_kv_heads: Positive = 4
    """Llama key/value heads."""
    text_vocab_size: Positive = 511
    """Text ids of the tokenizer; action bins follow them, then one padding id, then rows up to `pad_to_multiple_of`."""
    pad_to_multiple_of: Positive = 64
    """The embedding matrix is rounded up to a multiple of this."""
    action_head: Literal["tokens", "gaussian", "laplace", "l1"] = "tokens"
    """Actions as tokens, or as continuous numbers (not openvla); `l1` has no spread, and no likelihood for RL."""
    log_scale_range: tuple[float, float] = (-5.0, 2.0)
    """Least and largest log-scale of `gaussian` and `laplace`, in sampler and scorer alike; RIPT-VLA's is -2, 0.5."""
    num_action_bins: Annotated[int, Field(ge=2)] = 256
    """Bins per action dimension, at the end of the tokenizer's vocabulary."""
    action_dim: Positive = 4
    """Action dimensions D."""
    chunk_length: Positive = 5
    """Env steps K per decision."""
    proprio_dim: NonNegative = 0
    """Proprioception dimensions the model reads (not openvla); 0 reads none."""
    decoding: Literal["autoregressive", "parallel"] = "parallel"
    """`parallel` predicts all K*D tokens in one pass from learned query embeddings."""
    prompt_style: Literal["openvla", "openvla-v01"] = "openvla"
    """Text around an instruction; `openvla-v01` is that of the first release, with Vicuna's system prompt."""
    max_prompt_tokens: Positive = 13
    """Prompts are padded to this many tokens, so that shapes never vary; longer ones are refused."""
    official_unused: bool = False
    """Carry the parameters that official checkpoints hold but never use (last vision blocks, final norms, pooling)."""
    value_hidden_sizes: tuple[Positive, ...] = (128, 64)
    """Hidden widths of the value head (ReLU MLP, fp32)."""
    oft: OFTConfig = field(default_factory=OFTConfig)
    """For openvla_oft."""
    quest: QuestConfig = field(default_factory=QuestConfig)
    """For quest."""

    @property
    def num_cameras(self) -> int:
        """Frames per observation."""
        return len(self.quest.cameras) if self.architecture == "quest" else self.oft.num_cameras


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the linear layers."""

    rank: Positive = 32
    """Rank r."""
    alpha: PositiveFloat = 32.0
    """Scale numerator: the merged weight is W + alpha/rank * B A."""
    target_modules: Annotated[str, Field(min_length=1)] = "all-linear"
    """`all-linear`, or a regular expression over module names."""
    dropout: Decay = 0.0
    """Of the adapters' inputs while they learn. Scores are taken without it: ratios differ from 1 at the first step."""
    include_lm_head: bool = True
    """Adapt the output head too, which `all-linear` leaves out."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class SFTConfig:
    """Warm start: supervised fine-tuning on the demonstrations."""

    num_steps: NonNegative = 600
    """Optimiser steps."""
    batch_size: Positive = 64
    """Decisions per step."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate (one-cycle schedule)."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping."""
    shift_pixels: NonNegative = 3
    """Augmentation: random translation of up to this many pixels, edges repeated."""
    color_jitter: UnitInterval = 0.1
    """Augmentation: random brightness and contrast change, as a fraction."""
    num_threads: Positive = 2
    """CPU threads of the training process."""
    max_seconds: PositiveFloat | None = None
    """Train on past `num_steps`, at the final learning rate, until this wall time (for controls); None stops there."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class SelfBCConfig:
    """Self behaviour cloning: a buffer of the policy's own best episodes, and how much cloning them weighs."""

    capacity: Positive = 50
    """Episodes kept per task."""
    min_fill: NonNegative = 10
    """Below this many episodes of a task, every success is admitted."""
    statistic: Literal["mean", "median", "max", "best", "quantile"] = "mean"
    """A success is admitted if it is no longer than this of the stored lengths."""
    best_factor: Annotated[float, Field(ge=1)] = 1.0
    """For `statistic: best`: times the shortest length."""
    quantile: UnitInterval = 0.5
    """For `statistic: quantile`."""
    seed_demos: NonNegative = 10
    """Demonstrations of the warm start that each task's buffer starts with."""
    pin_demos: bool = False
    """Never evict those."""
    schedule: Literal[
        "tanh_ramp", "linear_decay", "success_adaptive", "kl_target", "grad_ratio", "entropy_adaptive", "constant"
    ] = "tanh_ramp"
    """How the weights of policy gradient and cloning change, see `algorithms.weight_schedules`."""
    ramp_updates: Positive = 10
    """`tanh_ramp`: the policy gradient weighs tanh(update / this). `linear_decay`: cloning ends after this many."""
    policy_weight: NonNegativeFloat = 1.0
    """Weight of the policy gradient, where the schedule does not set it."""
    bc_weight: NonNegativeFloat = 1.0
    """Weight of cloning, or what the schedule scales."""
    min_bc_weight: NonNegativeFloat = 0.0
    """No schedule lowers the weight of cloning below this."""
    max_bc_weight: PositiveFloat = 10.0
    """No schedule raises the weight of cloning above this."""
    success_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """`success_adaptive`: weight of an update's success in the running estimate."""
    kl_target: PositiveFloat = 0.01
    """`kl_target`: KL of an update above twice this raises the weight of cloning, below half of it lowers it."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class AlgorithmConfig:
    """Policy gradient; the names are those of the field."""

    name: str = "ppo"
    """Registered algorithm, or `my_package.my_algorithm:MyAlgorithm`."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Discount, per chunk or per env step according to `discount_mode`."""
    gae_lambda: UnitInterval = 0.95
    """GAE trace decay."""
    discount_mode: Literal["per_chunk", "smdp"] = "per_chunk"
    """`smdp` discounts by gamma^(executed env steps), inside the chunk too."""
    old_logprobs: Literal["engine", "learner"] = "engine"
    """Reference of the ratio: the engine's (equal to the learner's in fp32), or the learner's own (for bf16 or lag)."""
    max_importance_weight: PositiveFloat = 2.0
    """With the learner's: a decision weighs its probability now over that when it was drawn, at most this."""
    ratio_level: Literal["token", "action", "chunk"] = "action"
    """One importance ratio per token, per env action or per chunk."""
    clip_ratio_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio is clipped below at 1 - this."""
    clip_ratio_high: PositiveFloat = 0.28
    """The ratio is clipped above at 1 + this."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound the loss of very negative advantages at this ratio; None leaves it unbounded."""
    max_log_ratio: PositiveFloat = 20.0
    """Log-ratios are clamped to +- this, against overflow."""
    value_loss_coef: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    value_clip: PositiveFloat | None = 0.2
    """Clip range of the value update; None does not clip."""
    value_loss: Literal["squared", "huber"] = "squared"
    """Shape of the value loss."""
    huber_delta: PositiveFloat = 10.0
    """Where the Huber loss turns linear."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus over the action bins."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty to the reference policy (adapters disabled)."""
    target_kl: PositiveFloat | None = None
    """Stop the update when the approximate KL of a minibatch exceeds this; None never stops."""
    num_epochs: Positive = 2
    """Passes over the batch."""
    num_minibatches: Positive = 4
    """Optimiser steps per pass."""
    normalize_advantages: bool | None = None
    """Standardise advantages over the whole batch; None: where values give them (ppo), not where a group does."""
    baseline_scope: Literal["context", "batch"] = "context"
    """Which returns rloo and grpo compare: those from one initial state, or those of the whole batch."""
    loss_normalization: Literal["token_mean", "trajectory_mean", "fixed_horizon"] = "token_mean"
    """Denominator of the policy loss."""
    critic_warmup_updates: NonNegative = 1
    """Updates at the start that train the value head only."""
    self_bc: SelfBCConfig = field(default_factory=SelfBCConfig)
    """For chunk_ppo."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class RolloutConfig:
    """Env workers and how many episodes an iteration takes."""

    num_workers: Positive = 2
    """Env worker processes."""
    envs_per_worker: Positive = 12
    """Simulators per worker; even, as one half steps while the other waits for actions."""
    groups_per_update: Positive = 60
    """Groups (initial states) per update."""
    group_size: Positive = 1
    """Episodes per group (1 for PPO)."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of training episodes."""
    max_policy_lag: Annotated[int, Field(ge=0, le=1)] = 0
    """Updates a decision may be old. 0: roll out, learn, in turn. 1: the next rollout runs while the learner learns."""
    episode_deadline_s: PositiveFloat = 120.0
    """An episode that takes longer counts as hung: its worker is replaced and it is redone with the same seed."""
    max_attempts: Positive = 3
    """A task that fails this often ends the run as poison."""
    shuffle_rewards: bool = False
    """Negative control: permute episode outcomes within each iteration, so that there is nothing to learn."""
    max_inflight_bytes: Positive = 512 * 1024 * 1024
    """Bound on frames waiting in the object store; checked against it before start."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class SamplingConfig:
    """Which tasks and initial states an iteration draws, and which groups it learns from."""

    curriculum: Literal["uniform", "hardest", "frontier"] = "uniform"
    """Tasks in equal shares, or by success so far: exp((0.5-s)/temperature), or exp(-|0.5-s|/temperature)."""
    curriculum_temperature: PositiveFloat = 1.0
    """The smaller, the more pointed the curriculum."""
    curriculum_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of one group's success in its task's running estimate, which starts at 0.5."""
    dynamic: bool = False
    """Reject groups whose episodes all end alike (they hold no gradient) and draw others in their place."""
    min_success: UnitInterval = 0.0
    """Reject groups with a mean success below this, too."""
    max_success: UnitInterval = 1.0
    """Reject groups with a mean success above this, too."""
    early_stop_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """End an iteration once this fraction of `rollout.groups_per_update` is accepted."""
    max_attempts_factor: Annotated[float, Field(ge=1)] = 3.0
    """End an iteration after this many times `rollout.groups_per_update` attempted groups, accepted or not."""
    skip_solved: bool = False
    """Skip an initial state whose last group was solved throughout; it is tried again after four skips."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class VllmConfig:
    """The vLLM engine of a server."""

    max_model_len: Positive | None = None
    """Longest sequence, tokens; None takes what the model needs: prompt, patches of each camera, action tokens."""
    max_num_seqs: Positive = 64
    """Observations that are decoded at once; more wait."""
    kv_cache_bytes: Positive | None = None
    """Keys and values; None takes 1 GiB on CPUs, and on a GPU what `gpu_memory_utilization` leaves."""
    block_size: Positive | None = None
    """Tokens of a block of keys and values; None takes vLLM's: 128 on CPUs, 16 on GPUs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the GPU that weights, activations, keys and values may take together."""
    tensor_parallel_size: Positive = 1
    """GPUs that share one model; a server reserves as many."""
    enforce_eager: bool = True
    """Run without compiling and CUDA graphs: a start of seconds rather than minutes, at slower decoding on GPUs."""
    enable_prefix_caching: bool = False
    """Reuse keys and values of equal beginnings; frames come first in a prompt and hardly ever repeat."""
    lora: Literal["merged", "native"] = "merged"
    """Adapters: merged into the weights, or applied by vLLM beside them (slower tokens, on CPUs by far; no towers)."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class InferenceConfig:
    """The servers that answer with action chunks."""

    engine: str = "torch"
    """`torch`, `vllm` (for openvla with autoregressive decoding), or `my_package.my_engine:MyEngine`."""
    num_servers: Positive = 1
    """Server processes; requests leave a worker's own one for another where that has less to do."""
    batch_size: Positive = 12
    """Rows of one forward pass; in deterministic mode every batch is padded to it."""
    batch_window_ms: NonNegativeFloat = 0.0
    """How long to wait for more rows when fewer than `batch_size` are there."""
    num_threads: Positive = 1
    """CPU threads of a server; deterministic mode needs 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `auto` takes a GPU if the server was given one."""
    deadline_s: PositiveFloat = 60.0
    """Longest answer or loading of weights (7B off a slow disk: minutes); a server over it is taken for hung."""
    weight_transport: str = "object_store"
    """How servers get new adapters and heads: `object_store`, or a broadcast over `gloo` or `nccl` (GPUs, untried)."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """For engine `vllm`."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class LearnerConfig:
    """FSDP learner group."""

    num_ranks: Positive = 2
    """Processes; 1 rank and R ranks compute the same update."""
    train: Literal["lora", "full"] = "lora"
    """Train adapters and heads, or everything."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, where `train` is lora."""
    micro_batch_size: Positive = 128
    """Rows per rank and forward pass; gradients accumulate over them."""
    actor_learning_rate: PositiveFloat = 3e-4
    """AdamW learning rate of the policy."""
    critic_learning_rate: PositiveFloat = 1e-3
    """AdamW learning rate of the value head."""
    final_learning_rate_fraction: UnitInterval = 1.0
    """Both rates fall to this fraction, linearly until `num_iterations` or `max_rl_env_steps`; 1 keeps them."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW betas."""
    adam_eps: PositiveFloat = 1e-5
    """AdamW epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping, for policy and value head separately."""
    critic: Literal["shared", "separate"] = "shared"
    """Value head on the policy's backbone, or on the same frozen base with adapters of its own."""
    detach_value: bool = False
    """Stop value gradients at the backbone."""
    train_scale_head: bool = True
    """Train the spread of continuous actions; RIPT-VLA keeps it as it is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision; log-probabilities and losses are fp32 always."""
    fsdp_min_params: NonNegative = 1_000_000
    """FSDP gathers a layer of this many parameters just while it computes, smaller ones together for the whole pass."""
    num_threads: Positive = 1
    """CPU threads of a rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks run; `auto` takes a GPU if the rank was given one."""
    collective_timeout_s: PositiveFloat = 120.0
    """Process-group timeout: a hung rank is noticed after it."""
    deadline_s: PositiveFloat = 1800.0
    """An update that takes longer is an error."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class TrustConfig:
    """Checks that run inside every update; they stop the run, they do not warn."""

    deterministic: bool = False
    """Pad inference batches to a fixed shape, so that a run is bit-reproducible (CPU, lag 0)."""
    sampler_ratio_tolerance: PositiveFloat = 1e-4
    """Largest accepted |ratio - 1| between learner and engine: of any decision in fp32, in bf16 (there about 0.5) the
    root mean square over an update's decisions, nats."""
    canary_tolerance: PositiveFloat = 1e-4
    """Largest accepted log-probability difference between server and learner on the probe batch, nats; about 0.5 in
    bf16."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class CheckpointConfig:
    """When to commit and how much to keep."""

    every_updates: Positive = 10
    """Commit a checkpoint after this many updates, and at the end."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Committed checkpoints to keep."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation: exact enumeration of task x initial state."""

    every_updates: NonNegative = 0
    """Evaluate after this many updates (0: only before and after training)."""
    states_per_task: Positive = 50
    """Held-out initial states per task."""
    temperature: NonNegativeFloat = 0.0
    """Decoding temperature, the same before and after; 0 is greedy."""
    stop_on_success: bool = True
    """False runs every episode to the horizon, so that last-step success can differ from any-step success."""
    videos_per_task: NonNegative = 1
    """Held-out starts per task that are filmed before and after."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ClusterConfig:
    """What to ask Ray for."""

    address: str | None = None
    """Cluster to join; None joins the one a job was submitted to, else starts a local one."""
    dashboard: bool = False
    """Start the dashboard with a locally started Ray (about 1 GB of memory)."""
    elastic: bool = False
    """An autoscaler may add nodes: wait up to `placement_timeout_s` for resources that are not there yet."""
    object_store_bytes: Positive = 1024 * 1024 * 1024
    """Object store of a locally started Ray."""
    cpus_per_worker: NonNegativeFloat = 0.5
    """CPUs an env worker reserves."""
    cpus_per_rank: NonNegativeFloat = 0.25
    """CPUs a learner rank reserves."""
    cpus_per_server: NonNegativeFloat = 0.25
    """CPUs an inference server reserves."""
    gpus_per_rank: NonNegativeFloat = 0.0
    """GPUs a learner rank reserves."""
    gpus_per_server: NonNegativeFloat = 0.0
    """GPUs an inference server reserves."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Sliver of a GPU an env worker reserves for rendering; workers are spread evenly."""
    gpu_bytes: Positive | None = None
    """Memory of one GPU, to check before the start what must fit; None asks this machine's, if Ray starts here."""
    placement_timeout_s: PositiveFloat = 120.0
    """How long to wait for the reserved resources."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Weights & Biases project; None sends nothing."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ExperimentConfig:
    """One run."""

    name: str = "run"
    """Label of the run."""
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] = 0
    """Seed of everything random in the run."""
    run_dir: str | None = None
    """Run folder on a local or mounted file system; None takes `runs/<name>-seed<seed>`."""
    policy: str | None = None
    """Policy folder or published checkpoint to start from; None fine-tunes a new policy on demonstrations."""
    unnorm_key: str | None = None
    """Dataset whose action statistics a published checkpoint is to use; None where it has those of one only."""
    num_iterations: NonNegative = 40
    """Rollout iterations (attempts at an update)."""
    max_rl_seconds: PositiveFloat | None = None
    """Stop the RL part after the iteration that passes this wall time."""
    max_rl_env_steps: Positive | None = None
    """Stop the RL part after the iteration that passes this many env steps of training (to compare at equal cost)."""
    env: EnvConfig = field(default_factory=EnvConfig)
    demos: DemosConfig = field(default_factory=DemosConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    trust: TrustConfig = field(default_factory=TrustConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
