"""Checks across the fields of one config that need no cluster; each names field, value, what is allowed, what to do."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlarl_ray import registry
from vlarl_ray.config import ExperimentConfig, ModelConfig, OFTConfig, SamplingConfig
from vlarl_ray.config_fields import field_docs
from vlarl_ray.env_checks import env_problems, expanded_tasks, expert_problems
from vlarl_ray.preprocessing_config import PreprocessingConfig
from vlarl_ray.quest_checks import quest_problems
from vlarl_ray.vllm_checks import model_problems, vllm_problems, weight_transport_problems

_BFLOAT16_TOLERANCE = 2**-7
"""Two roundings of a log-probability of 1 nat; no run in bfloat16 stays below."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config."""

    fields: tuple[str, ...]
    """Dotted paths of the fields it compares."""
    message: str


def check_config(cfg: ExperimentConfig, environ: Mapping[str, str] = os.environ) -> list[Problem]:
    """Find every contradiction between fields, and everything this machine lacks.

    Args:
        cfg: Fields that are valid one by one.
        environ: Environment variables, which tell whether this is a submitted Ray job.
    """
    checks = (
        _names,
        _env,
        _model,
        _preprocessing,
        check_quest,
        _learning,
        _rollout,
        _sampling,
        _self_bc,
        _chunk_ppo,
        _control,
        _memory,
        _devices,
        _lag,
        _trust,
        _vllm,
    )
    return [
        *(p for check in checks for p in check(cfg)),
        *_paths(cfg, in_ray_job="RAY_JOB_CONFIG_JSON_ENV_VAR" in environ),
    ]


def _names(cfg: ExperimentConfig) -> Iterator[Problem]:
    tables = {
        "env.suite": (cfg.env.suite, registry.SUITES),
        "model.architecture": (cfg.model.architecture, registry.MODELS),
        "algorithm.name": (cfg.algorithm.name, registry.ALGORITHMS),
        "inference.engine": (cfg.inference.engine, registry.ENGINES),
    }
    for path, (name, table) in tables.items():
        if name not in table and not re.fullmatch(r"[\w.]+:\w+", name):
            advice = f"{registry.suggest(name, table)}, or give 'my_package.my_module:MyClass'"
            yield Problem((path,), f"{path} = {name!r} is unknown; {advice}.")
        elif name not in table and not _is_importable(name.partition(":")[0]):
            advice = "its module is not on the Python path; install the package, or mend the name"
            yield Problem((path,), f"{path} = {name!r}: {advice}.")
    if not re.fullmatch(r"[\w][\w.-]*", cfg.name):
        yield Problem(("name",), f"name = {cfg.name!r}: becomes a folder; use letters, digits, '_', '-', '.' only.")
    for path in field_docs():
        value = value_at(cfg, path)
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem((path,), f"{path} = {value}: must be finite; give a number, or leave it out.")
    target = cfg.learner.lora.target_modules
    try:
        re.compile(target)
    except re.error as error:
        path = "learner.lora.target_modules"
        yield Problem((path,), f"{path} = {target!r} is no regular expression ({error}); mend it, or write all-linear.")


def _env(cfg: ExperimentConfig) -> Iterator[Problem]:
    for fields, message in env_problems(cfg):
        yield Problem(fields, message)


def _is_importable(module: str) -> bool:
    """Whether a module can be found, without running it (its parent packages are imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _model(cfg: ExperimentConfig) -> Iterator[Problem]:
    model = cfg.model
    divisions = [
        ("model.image_size", "model.patch_size"),
        ("model.hidden_size", "model.num_heads"),
        ("model.num_heads", "model.num_kv_heads"),
        ("model.dino.dim", "model.dino.num_heads"),
        ("model.siglip.dim", "model.siglip.num_heads"),
    ]
    for whole, part in divisions:
        dividend, divisor = value_at(cfg, whole), value_at(cfg, part)
        if dividend % divisor:
            nearest = max(divisor, round(dividend / divisor) * divisor)
            advice = f"must be a multiple of {part} = {divisor}; set {whole} to {nearest}, for instance"
            yield Problem((whole, part), f"{whole} = {dividend}: {advice}.")
    head, odd = divmod(model.hidden_size, model.num_heads)
    if not odd and head % 2:
        advice = f"gives heads of {head}, but rotary embeddings need an even size; set {2 * head * model.num_heads}"
        fields = ("model.hidden_size", "model.num_heads")
        yield Problem(
            fields, f"model.hidden_size = {model.hidden_size} / model.num_heads = {model.num_heads} {advice}."
        )
    low, high = model.log_scale_range
    if low >= high:
        advice = "must rise; give the least, then the largest"
        yield Problem(("model.log_scale_range",), f"model.log_scale_range = [{low:g}, {high:g}]: {advice}.")
    if model.architecture == "openvla":
        for path, only in (("model.action_head", "tokens"), ("model.proprio_dim", 0)):
            if value_at(cfg, path) != only:
                advice = f"openvla acts in tokens and reads frames and prompt; set {path} to {only}"
                yield Problem((path, "model.architecture"), f"{path} = {value_at(cfg, path)}: {advice}.")
    yield from _oft(cfg)
    if model.chunk_length > cfg.env.max_env_steps:
        fields = ("model.chunk_length", "env.max_env_steps")
        advice = f"a chunk is longer than an episode, env.max_env_steps = {cfg.env.max_env_steps}; shorten the chunk"
        yield Problem(fields, f"model.chunk_length = {model.chunk_length}: {advice}.")


def check_start(cfg: ExperimentConfig) -> list[Problem]:
    """Find out whether the run has something to start from."""
    problems = [Problem(fields, message) for fields, message in expert_problems(cfg)]
    if cfg.model.action_head == "l1" and cfg.model.architecture in registry.MODELS:
        message = (
            "model.action_head = l1: has no likelihood, so RL cannot train it; set laplace or gaussian, or fine-tune "
            "it (vlarl sft), give it a spread with vlarl_ray.models.add_scale_head, and pass that folder as policy."
        )
        problems.append(Problem(("model.action_head",), message))
    return problems


def check_quest(cfg: ExperimentConfig) -> Iterator[Problem]:
    """Find what a QueST policy rules out; also for one whose model config comes with the policy."""
    if cfg.model.architecture != "quest":
        return
    for fields, message in quest_problems(cfg.model):
        yield Problem(fields, message)
    if cfg.algorithm.ratio_level == "action":
        advice = (
            "quest's codes are of the chunk as a whole, so an action has no ratio of its own; set token (as RIPT-VLA "
            "does) or chunk"
        )
        fields = ("algorithm.ratio_level", "model.architecture")
        yield Problem(fields, f"algorithm.ratio_level = action: {advice}.")
    for path in ("learner.dtype", "inference.dtype"):
        if value_at(cfg, path) != "float32":
            advice = "quest computes in float32; its twenty million weights would gain nothing. Set it to that"
            yield Problem((path, "model.architecture"), f"{path} = {value_at(cfg, path)}: {advice}.")


def _vllm(cfg: ExperimentConfig) -> Iterator[Problem]:
    for fields, message in (*vllm_problems(cfg), *weight_transport_problems(cfg)):
        yield Problem(fields, message)


def check_served(cfg: ExperimentConfig, model: ModelConfig) -> Iterator[Problem]:
    """Find what keeps the engine from serving a model that comes with the policy."""
    for fields, message in model_problems(cfg, model):
        yield Problem(fields, message)


def _preprocessing(cfg: ExperimentConfig) -> Iterator[Problem]:
    section, steps = "model.preprocessing", cfg.model.preprocessing.frame_steps
    if cfg.model.architecture == "pixel_mlp" and cfg.model.preprocessing != PreprocessingConfig():
        message = "is not for pixel_mlp, which resizes frames in its own way; leave it out"
        yield Problem((section, "model.architecture"), f"{section} {message}.")
        return
    for step in sorted({step for step in steps if steps.count(step) > 1}):
        message = f"names {step!r} more than once; name it once, where it is to be done"
        yield Problem((f"{section}.frame_steps",), f"{section}.frame_steps {message}.")
    settings = {"jpeg_quality": "jpeg", "lanczos_size": "lanczos", "crop_area": "center_crop"}
    for field, step in settings.items():
        path, value = f"{section}.{field}", getattr(cfg.model.preprocessing, field)
        if step not in steps and value != getattr(PreprocessingConfig(), field):
            message = f"has no effect unless {section}.frame_steps names {step!r}; add it there, or leave this out"
            yield Problem((path, f"{section}.frame_steps"), f"{path} = {value}: {message}.")


def _oft(cfg: ExperimentConfig) -> Iterator[Problem]:
    model, oft = cfg.model, cfg.model.oft
    if model.architecture in ("openvla", "pixel_mlp", "quest"):
        for field, default in asdict(OFTConfig()).items():  # type: ignore[call-overload]
            if getattr(oft, field) != default:
                path = f"model.oft.{field}"
                message = f"is for openvla_oft, not {model.architecture}; leave it out"
                yield Problem((path, "model.architecture"), f"{path} = {getattr(oft, field)}: {message}.")
    if model.architecture != "openvla_oft":
        return
    if model.decoding != "parallel":
        advice = "openvla_oft predicts the whole chunk at once; set parallel"
        yield Problem(("model.decoding", "model.architecture"), f"model.decoding = {model.decoding}: {advice}.")
    if oft.stop_token_id >= model.text_vocab_size:
        fields = ("model.oft.stop_token_id", "model.text_vocab_size")
        message = f"is no text id; set one below model.text_vocab_size = {model.text_vocab_size}"
        yield Problem(fields, f"model.oft.stop_token_id = {oft.stop_token_id}: {message}.")
    if oft.detach_prompt and oft.passes == "one":
        fields = ("model.oft.detach_prompt", "model.oft.passes")
        message = "needs a pass of its own for the prompt; set model.oft.passes to two, or leave this out"
        yield Problem(fields, f"model.oft.detach_prompt = true: {message}.")


def _learning(cfg: ExperimentConfig) -> Iterator[Problem]:
    algorithm, learner = cfg.algorithm, cfg.learner
    warmup = algorithm.critic_warmup_updates
    if algorithm.name not in ("rloo", "grpo") and 0 < cfg.num_iterations <= warmup:  # those have no critic
        advice = (
            f"covers all num_iterations = {cfg.num_iterations}, so the policy never learns; lower it, or set both to 0"
        )
        fields = ("algorithm.critic_warmup_updates", "num_iterations")
        yield Problem(fields, f"algorithm.critic_warmup_updates = {warmup}: {advice}.")
    for path, asked in (("algorithm.kl_coef", algorithm.kl_coef > 0), ("learner.critic", learner.critic == "separate")):
        if asked and learner.train == "full":
            advice = "needs the frozen base under the adapters; set learner.train = lora, or leave this out"
            yield Problem(
                (path, "learner.train"), f"{path} = {value_at(cfg, path)} with learner.train = full: {advice}."
            )
    yield from _dropout(cfg)
    episodes = cfg.rollout.groups_per_update * cfg.rollout.group_size
    if learner.num_ranks > episodes:
        advice = f"an update has {episodes} episodes, so some rank would get none; set at most {episodes}"
        fields = ("learner.num_ranks", "rollout.groups_per_update", "rollout.group_size")
        yield Problem(fields, f"learner.num_ranks = {learner.num_ranks}: {advice}.")
    elif learner.num_ranks * algorithm.num_minibatches > episodes:
        # an episode may end within its first decision: this many rows are sure, more are not
        limit = episodes // learner.num_ranks
        advice = (
            f"an update is sure of {episodes} rows for learner.num_ranks = {learner.num_ranks}; set at most {limit}"
        )
        fields = ("algorithm.num_minibatches", "learner.num_ranks", "rollout.groups_per_update", "rollout.group_size")
        yield Problem(fields, f"algorithm.num_minibatches = {algorithm.num_minibatches}: {advice}.")


def _dropout(cfg: ExperimentConfig) -> Iterator[Problem]:
    path, dropout = "learner.lora.dropout", cfg.learner.lora.dropout
    if dropout == 0:
        return
    if cfg.learner.train == "full":
        advice = "is of adapters, and learner.train = full has none; set learner.train = lora, or leave this out"
        yield Problem((path, "learner.train"), f"{path} = {dropout}: {advice}.")
    # Both act on the KL of an update, which dropout makes positive before the weights have moved.
    steered = {
        "algorithm.target_kl": cfg.algorithm.target_kl is not None,
        "algorithm.self_bc.schedule": (cfg.algorithm.name, cfg.algorithm.self_bc.schedule)
        == ("chunk_ppo", "kl_target"),
    }
    for other in (name for name, is_set in steered.items() if is_set):
        advice = f"its noise is part of the KL that {other} = {value_at(cfg, other)} goes by; leave out one of them"
        yield Problem((path, other), f"{path} = {dropout}: {advice}.")


def _rollout(cfg: ExperimentConfig) -> Iterator[Problem]:
    rollout, name = cfg.rollout, cfg.algorithm.name
    if rollout.envs_per_worker % 2:
        advice = "must be even, as one half steps while the other waits for actions"
        yield Problem(
            ("rollout.envs_per_worker",),
            f"rollout.envs_per_worker = {rollout.envs_per_worker}: {advice}; set {rollout.envs_per_worker + 1}.",
        )
    if cfg.inference.deadline_s >= rollout.episode_deadline_s:
        advice = (
            "the workers of a server that hangs return nothing either, and would be taken for hung after "
            f"rollout.episode_deadline_s = {rollout.episode_deadline_s:g}; set it below that"
        )
        fields = ("inference.deadline_s", "rollout.episode_deadline_s")
        yield Problem(fields, f"inference.deadline_s = {cfg.inference.deadline_s:g}: {advice}.")
    fields = ("rollout.group_size", "algorithm.name", "algorithm.baseline_scope")
    if name in ("ppo", "chunk_ppo") and rollout.group_size != 1:
        advice = f"{name} has a critic and compares nothing within a group; set 1, and raise rollout.groups_per_update"
        yield Problem(fields[:2], f"rollout.group_size = {rollout.group_size}: {advice}.")
    if name in ("rloo", "grpo"):
        if cfg.algorithm.baseline_scope == "context" and rollout.group_size < 2:
            advice = f"{name} compares the episodes of a group; set at least 2 (8 is usual)"
            yield Problem(fields, f"rollout.group_size = {rollout.group_size}: {advice}.")
        elif rollout.group_size * rollout.groups_per_update < 2:
            advice = f"{name} compares the episodes of an update, which has one; set more groups_per_update"
            yield Problem(fields, f"rollout.groups_per_update = {rollout.groups_per_update}: {advice}.")


def _sampling(cfg: ExperimentConfig) -> Iterator[Problem]:
    sampling, rollout = cfg.sampling, cfg.rollout
    if sampling.dynamic and rollout.group_size < 2:
        message = "sampling.dynamic rejects groups whose episodes all end alike, and a group of one always does"
        fields = ("sampling.dynamic", "rollout.group_size")
        yield Problem(fields, f"rollout.group_size = {rollout.group_size}: {message}; set at least 2, or dynamic off.")
    if sampling.min_success > sampling.max_success:
        fields = ("sampling.min_success", "sampling.max_success")
        message = f"is above sampling.max_success = {sampling.max_success}, so every group would be rejected; lower it"
        yield Problem(fields, f"sampling.min_success = {sampling.min_success}: {message}.")
    elif sampling.dynamic and not any(
        sampling.min_success <= count / rollout.group_size <= sampling.max_success
        for count in range(1, rollout.group_size)
    ):
        fields = ("sampling.min_success", "sampling.max_success", "rollout.group_size")
        message = (
            f"sampling.min_success = {sampling.min_success}, sampling.max_success = {sampling.max_success}: no group "
            f"of {rollout.group_size} lies between them unless all its episodes end alike, so every group would be "
            "rejected; widen them, or raise rollout.group_size."
        )
        if rollout.group_size > 1:
            yield Problem(fields, message)
    if sampling.dynamic:
        return
    defaults = SamplingConfig()
    for field in ("min_success", "max_success", "early_stop_fraction", "max_attempts_factor"):
        if getattr(sampling, field) != getattr(defaults, field):
            path = f"sampling.{field}"
            message = "has no effect without sampling.dynamic = true; set that, or leave this out"
            yield Problem((path, "sampling.dynamic"), f"{path} = {getattr(sampling, field)}: {message}.")


def _self_bc(cfg: ExperimentConfig) -> Iterator[Problem]:
    self_bc = cfg.algorithm.self_bc
    if self_bc.min_fill > self_bc.capacity:
        fields = ("algorithm.self_bc.min_fill", "algorithm.self_bc.capacity")
        message = f"is above algorithm.self_bc.capacity = {self_bc.capacity}; lower it"
        yield Problem(fields, f"algorithm.self_bc.min_fill = {self_bc.min_fill}: {message}.")
    if self_bc.min_bc_weight > self_bc.max_bc_weight:
        fields = ("algorithm.self_bc.min_bc_weight", "algorithm.self_bc.max_bc_weight")
        message = f"is above algorithm.self_bc.max_bc_weight = {self_bc.max_bc_weight}; lower it"
        yield Problem(fields, f"algorithm.self_bc.min_bc_weight = {self_bc.min_bc_weight}: {message}.")
    elif self_bc.bc_weight > self_bc.max_bc_weight:
        fields = ("algorithm.self_bc.bc_weight", "algorithm.self_bc.max_bc_weight")
        message = (
            f"is above algorithm.self_bc.max_bc_weight = {self_bc.max_bc_weight}, which would bound it; raise that"
        )
        yield Problem(fields, f"algorithm.self_bc.bc_weight = {self_bc.bc_weight}: {message}.")


def _chunk_ppo(cfg: ExperimentConfig) -> Iterator[Problem]:
    if cfg.algorithm.name != "chunk_ppo":
        return
    path, self_bc = "algorithm.self_bc", cfg.algorithm.self_bc
    if self_bc.pin_demos and self_bc.seed_demos >= self_bc.capacity:
        fields = (f"{path}.pin_demos", f"{path}.seed_demos", f"{path}.capacity")
        message = f"fills {path}.capacity = {self_bc.capacity} for good with {path}.seed_demos = {self_bc.seed_demos}"
        yield Problem(fields, f"{path}.pin_demos = true: {message}, so no episode ever enters; raise the capacity.")
    if self_bc.schedule == "entropy_adaptive" and cfg.model.action_head != "tokens":
        fields = (f"{path}.schedule", "model.action_head")
        message = (
            f"divides entropies, which a continuous head (model.action_head = {cfg.model.action_head}) has below 0"
        )
        yield Problem(fields, f"{path}.schedule = entropy_adaptive: {message}; set another schedule.")
    if cfg.rollout.shuffle_rewards:
        message = (
            "is no control of chunk_ppo, which clones the episodes that truly succeeded; set algorithm.name to ppo"
        )
        yield Problem(("rollout.shuffle_rewards", "algorithm.name"), f"rollout.shuffle_rewards = true: {message}.")


def _control(cfg: ExperimentConfig) -> Iterator[Problem]:
    if cfg.rollout.shuffle_rewards and cfg.algorithm.gamma != 1:
        message = (
            f"algorithm.gamma = {cfg.algorithm.gamma}: rollout.shuffle_rewards needs 1, as a discount would tell short "
            "(successful) episodes from long ones; set algorithm.gamma to 1."
        )
        yield Problem(("algorithm.gamma", "rollout.shuffle_rewards"), message)


def _memory(cfg: ExperimentConfig) -> Iterator[Problem]:
    rollout = cfg.rollout
    decisions = -(-cfg.env.max_env_steps // cfg.model.chunk_length)
    iterations = 1 + rollout.max_policy_lag  # the next one rolls out while this one is learned from
    frames = iterations * rollout.groups_per_update * rollout.group_size * (decisions + 1)
    if cfg.algorithm.name == "chunk_ppo":  # the buffer's frames stay in the object store
        frames += len(expanded_tasks(cfg.env)) * cfg.algorithm.self_bc.capacity * (decisions + 1)
    frames *= len(cfg.env.cameras)
    planned = frames * cfg.env.image_size**2 * 3
    sizes = ("env.image_size", "env.max_env_steps", "model.chunk_length")
    if planned > rollout.max_inflight_bytes:
        advice = (
            f"an update holds up to {frames} frames of {cfg.env.image_size}x{cfg.env.image_size}x3 = {planned} bytes; "
            f"raise it to at least that, or lower rollout.groups_per_update, rollout.group_size or env.image_size"
        )
        fields = ("rollout.max_inflight_bytes", "rollout.groups_per_update", "rollout.group_size", *sizes)
        yield Problem(fields, f"rollout.max_inflight_bytes = {rollout.max_inflight_bytes}: {advice}.")
    if cfg.cluster.address is None and rollout.max_inflight_bytes > cfg.cluster.object_store_bytes:
        advice = (
            f"more than cluster.object_store_bytes = {cfg.cluster.object_store_bytes}, so frames would spill to disk"
        )
        fields = ("rollout.max_inflight_bytes", "cluster.object_store_bytes")
        message = f"rollout.max_inflight_bytes = {rollout.max_inflight_bytes}: {advice}; lower it, or raise the store."
        yield Problem(fields, message)


def _devices(cfg: ExperimentConfig) -> Iterator[Problem]:
    roles = (("learner", cfg.learner.device, "gpus_per_rank"), ("inference", cfg.inference.device, "gpus_per_server"))
    for section, device, name in roles:
        gpus = value_at(cfg, f"cluster.{name}")
        fields = (f"{section}.device", f"cluster.{name}")
        if device == "cuda" and not gpus:
            advice = f"reserves no GPU, as cluster.{name} = 0; set cluster.{name} to 1, or the device to auto"
            yield Problem(fields, f"{section}.device = cuda: {advice}.")
        if device == "cpu" and gpus:
            advice = f"would leave the reserved GPU idle (cluster.{name} = {gpus}); set it to 0, or the device to auto"
            yield Problem(fields, f"{section}.device = cpu: {advice}.")
    gpus = cfg.cluster.gpus_per_rank
    if gpus not in (0, 1):
        advice = "a rank drives exactly one GPU, and NCCL refuses to share one; set 0 or 1"
        yield Problem(("cluster.gpus_per_rank",), f"cluster.gpus_per_rank = {gpus}: {advice}.")
    if cfg.cluster.gpus_per_worker and cfg.env.gl_backend == "osmesa":
        advice = "renders on the CPU, so cluster.gpus_per_worker would be idle; set egl, or gpus_per_worker to 0"
        yield Problem(("env.gl_backend", "cluster.gpus_per_worker"), f"env.gl_backend = osmesa: {advice}.")
    if cfg.learner.dtype != cfg.inference.dtype:
        advice = "must equal learner.dtype: sampling and scoring are one distribution; set both alike"
        message = f"inference.dtype = {cfg.inference.dtype}, learner.dtype = {cfg.learner.dtype}: {advice}."
        yield Problem(("inference.dtype", "learner.dtype"), message)


def _lag(cfg: ExperimentConfig) -> Iterator[Problem]:
    if cfg.rollout.max_policy_lag and cfg.algorithm.old_logprobs == "engine":
        advice = (
            "its decisions may be an update old, so the ratio must refer to the learner's log-probabilities; set "
            "algorithm.old_logprobs to learner"
        )
        fields = ("rollout.max_policy_lag", "algorithm.old_logprobs")
        yield Problem(fields, f"rollout.max_policy_lag = {cfg.rollout.max_policy_lag}: {advice}.")


def _trust(cfg: ExperimentConfig) -> Iterator[Problem]:
    for path in ("trust.canary_tolerance", "trust.sampler_ratio_tolerance"):
        if cfg.inference.dtype == "bfloat16" and value_at(cfg, path) < _BFLOAT16_TOLERANCE:
            advice = (
                "in bfloat16 engine and learner differ by rounding alone (by 0.37 nats in a small policy with steep "
                "logits); set it to 0.5"
            )
            yield Problem((path, "inference.dtype"), f"{path} = {value_at(cfg, path):g}: {advice}.")
    if not cfg.trust.deterministic:
        return
    wanted = {
        "inference.num_threads": (1, cfg.inference.num_threads != 1),
        "rollout.max_policy_lag": (0, cfg.rollout.max_policy_lag != 0),
        "inference.device": ("cpu", cfg.inference.device == "cuda"),
        "learner.device": ("cpu", cfg.learner.device == "cuda"),
        "cluster.gpus_per_server": (0, cfg.cluster.gpus_per_server > 0),
        "cluster.gpus_per_rank": (0, cfg.cluster.gpus_per_rank > 0),
    }
    for path, (value, differs) in wanted.items():
        if differs:
            advice = f"trust.deterministic needs {value}; set it, or trust.deterministic to false"
            yield Problem((path, "trust.deterministic"), f"{path} = {value_at(cfg, path)}: {advice}.")


def _paths(cfg: ExperimentConfig, *, in_ray_job: bool) -> Iterator[Problem]:
    assets = cfg.env.assets
    if assets is not None and not Path(assets).is_dir():
        advice = "no such folder; name the one that holds LIBERO's scenes, or leave it out to look where LIBERO does"
        yield Problem(("env.assets",), f"env.assets = {assets!r}: {advice}.")
    for path in ("policy", "demos.path"):
        folder = value_at(cfg, path)
        if folder is not None and "://" not in folder and not Path(folder).is_dir():
            yield Problem((path,), f"{path} = {folder!r}: no such folder; mend it, or leave it out to make a new one.")
    if cfg.policy is not None and Path(cfg.policy).is_dir() and not (Path(cfg.policy) / "config.json").is_file():
        yield Problem(("policy",), f"policy = {cfg.policy!r}: has no config.json, so it is no policy folder; name one.")
    demos = cfg.demos.path
    if demos is not None and Path(demos).is_dir() and not any(Path(demos).glob("*.parquet")):
        yield Problem(("demos.path",), f"demos.path = {demos!r}: holds no demonstrations (*.parquet); name another.")
    run_dir = cfg.run_dir or ""
    if run_dir and Path(run_dir).exists() and not Path(run_dir).is_dir():
        yield Problem(("run_dir",), f"run_dir = {run_dir!r}: is a file; name a folder (--run-dir).")
    if "://" in run_dir:
        advice = "is a URI, but a run is written to folders only; mount the storage, and give the path (--run-dir)"
        yield Problem(("run_dir",), f"run_dir = {run_dir!r}: {advice}.")
    elif in_ray_job and not os.path.isabs(run_dir):
        advice = "lies in the job's temporary folder and is lost with it; give an absolute path (--run-dir)"
        yield Problem(("run_dir",), f"run_dir = {cfg.run_dir!r} in a submitted Ray job: {advice}.")
    if cfg.metrics.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        advice = "wandb is not installed; run pip install 'vlarl_ray[wandb]', or leave this out"
        project = cfg.metrics.wandb_project
        yield Problem(("metrics.wandb_project",), f"metrics.wandb_project = {project!r}: {advice}.")


def value_at(cfg: ExperimentConfig, path: str) -> Any:
    """Look up a dotted path."""
    value: Any = cfg
    for name in path.split("."):
        value = getattr(value, name)
    return value
