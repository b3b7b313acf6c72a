"""From nothing to a policy that can be improved: scripted demonstrations, then supervised fine-tuning."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlarl_ray.config import EnvConfig, ExperimentConfig, ModelConfig
from vlarl_ray.config_checks import check_quest, check_served
from vlarl_ray.config_loader import ConfigError
from vlarl_ray.demos.collect import collect_demonstrations
from vlarl_ray.demos.store import Demonstration, chunks, load_demonstrations
from vlarl_ray.env_checks import camera_problems, expert_problems
from vlarl_ray.envs.base import Suite
from vlarl_ray.registry import suggest
from vlarl_ray.types import FrameRef, StoredEpisode

_LOG = logging.getLogger(__name__)


def demonstrations(cfg: ExperimentConfig, suite: Suite, run_dir: Path) -> list[Demonstration]:
    """Load the demonstrations of `demos.path`, or collect them into the run folder (once).

    Raises:
        ConfigError: If they are to be collected, and the suite has no expert.
    """
    problems = [message for _, message in expert_problems(cfg)]
    if problems:
        raise ConfigError(problems)
    path = Path(cfg.demos.path) if cfg.demos.path is not None else run_dir / "demos"
    if cfg.demos.path is None:
        collect_demonstrations(cfg.env, cfg.demos, seed=cfg.seed, path=path, num_processes=2)
    return load_demonstrations(path, suite=suite.name, task_ids=suite.task_ids, env=cfg.env)


def fine_tuned_policy(cfg: ExperimentConfig, suite: Suite, demos: list[Demonstration], run_dir: Path) -> Path:
    """Fine-tune a new policy on demonstrations and save it, unless the run folder holds it already.

    Returns:
        The policy folder, `<run_dir>/policy`.
    """
    folder = run_dir / "policy"
    if (folder / "config.json").exists():  # written last
        return folder
    # torch is imported late: a run that starts from a checkpoint never needs it in the driver's start-up.
    from vlarl_ray.models import new_policy
    from vlarl_ray.sft import run_sft

    instructions = [suite.instruction(task_id) for task_id in suite.task_ids]
    model = new_policy(cfg.model, instructions, cfg.seed, metadata=camera_settings(cfg.env))
    run_sft(model, demos, cfg.sft, chunk_length=cfg.model.chunk_length, seed=cfg.seed, log=_LOG.info)
    model.save(folder)
    return folder


def given_policy(cfg: ExperimentConfig, folder: Path) -> Path:
    """Return the policy folder to start from: the given one, or `folder`, made to refer to a published checkpoint."""
    from vlarl_ray.models.official import is_official
    from vlarl_ray.models.policy_import import import_policy

    assert cfg.policy is not None
    source = Path(cfg.policy)
    if not is_official(source):
        return source
    return import_policy(source, folder, cfg.model, unnorm_key=cfg.unnorm_key, seed=cfg.seed)


def stored_demonstrations(
    cfg: ExperimentConfig, suite: Suite, path: Path, put: Callable[[Any], FrameRef]
) -> list[StoredEpisode]:
    """Turn the first demonstrations of each task into what the self-cloning buffer holds: a chunk at every env step.

    Args:
        cfg: Says how many, and whether they are ever evicted.
        suite: Whose tasks they are of.
        path: Folder of the store.
        put: Stores frames and returns a reference to them.
    """
    taken: Counter[str] = Counter()
    episodes = []
    for demonstration in load_demonstrations(path, suite=suite.name, task_ids=suite.task_ids, env=cfg.env):
        number = taken[demonstration.task_id]
        if number >= cfg.algorithm.self_bc.seed_demos:
            continue
        taken[demonstration.task_id] += 1
        actions, executed = chunks(demonstration.actions, cfg.model.chunk_length)
        episodes.append(
            StoredEpisode(
                key=f"demo-{demonstration.task_id}-{number}",
                task_id=demonstration.task_id,
                instruction=demonstration.instruction,
                frames=put(demonstration.frames[:-1]),
                proprio=demonstration.proprio[:-1],
                actions=actions,
                num_env_steps=executed.sum(axis=1).astype(np.int32),
                length=len(demonstration.actions),
                pinned=cfg.algorithm.self_bc.pin_demos,
            )
        )
    return episodes


def camera_settings(env: EnvConfig) -> dict[str, Any]:
    """What a policy's frames depend on; kept with its weights, so that it is not run on other frames by mistake."""
    names = ("suite", "camera", "image_size", "render_profile", "options")
    return json.loads(json.dumps({name: getattr(env, name) for name in names}))  # lists as they are read back


def check_policy(cfg: ExperimentConfig, policy_dir: Path) -> ModelConfig:
    """Check that a given policy fits the config.

    Returns:
        The policy's own model config.

    Raises:
        ConfigError: If its frames were rendered otherwise, are more or fewer, or the config describes another model.
        ValueError: From `read_official`, where it is a published checkpoint.
    """
    from vlarl_ray.models.official import is_official, read_official
    from vlarl_ray.models.policy import describe_policy

    if is_official(policy_dir):  # of its frames it says nothing
        model = read_official(policy_dir, cfg.model, unnorm_key=cfg.unnorm_key).model
        problems = _model_problems(cfg, model)
        if model.architecture != "quest" and not (policy_dir / "tokenizer.json").exists():
            message = "its prompts cannot be encoded without; take the file that was published with it"
            problems.append(f"{policy_dir / 'tokenizer.json'} does not exist: {message}.")
        if problems:
            raise ConfigError(problems)
        return model
    description = describe_policy(policy_dir)
    trained_on = description["metadata"]
    problems = [
        f"env.{name} = {wanted!r}, but the policy {policy_dir} was trained with {trained_on[name]!r}; "
        f"set env.{name} to that, or fine-tune a policy for these frames."
        for name, wanted in camera_settings(cfg.env).items()
        if name in trained_on and trained_on[name] != wanted
    ]
    model = description["model"]
    if cfg.model not in (ModelConfig(), model):
        theirs, ours = asdict(model), asdict(cfg.model)  # type: ignore[call-overload]
        problems += [
            f"model.{name} = {ours[name]!r}, but the policy {policy_dir} has {theirs[name]!r}; leave `model` "
            "out, it comes with the policy."
            for name in ours
            if ours[name] != theirs[name]
        ]
    problems += _model_problems(cfg, model)
    if problems:
        raise ConfigError(problems)
    return model


def _model_problems(cfg: ExperimentConfig, model: ModelConfig) -> list[str]:
    """What a run does not allow of the model that comes with its policy."""
    with_it = replace(cfg, model=model)
    of_fields = [*check_quest(with_it), *check_served(cfg, model)]
    return [*(problem.message for problem in of_fields), *(message for _, message in camera_problems(with_it))]


def check_instructions(cfg: ExperimentConfig, suite: Suite) -> None:
    """Check that the policy a run starts from can be given the suite's instructions.

    Raises:
        ConfigError: Naming every task whose instruction is not in the policy's table, where it has one, or makes too
            long a prompt.
    """
    if cfg.policy is None:
        return
    wanted = {task_id: suite.instruction(task_id) for task_id in suite.task_ids}
    check = _unknown_instructions if cfg.model.architecture == "quest" else _long_prompts
    problems = check(cfg, Path(cfg.policy), wanted)
    if problems:
        raise ConfigError(problems)


def _unknown_instructions(cfg: ExperimentConfig, source: Path, wanted: Mapping[str, str]) -> list[str]:
    from vlarl_ray.models.official import is_official, read_official
    from vlarl_ray.models.policy import describe_policy

    if is_official(source):
        known = read_official(source, cfg.model, unnorm_key=cfg.unnorm_key).metadata["instructions"]
    else:
        known = describe_policy(source)["metadata"].get("instructions", [])
    return [
        f"env.tasks: the instruction of {task_id!r}, {text!r}, is not among those that the policy {source} knows; "
        f"{suggest(text, known)}. Leave the task out, or mend `instructions` in the checkpoint's config.json."
        for task_id, text in wanted.items()
        if text not in known
    ]


def _long_prompts(cfg: ExperimentConfig, source: Path, wanted: Mapping[str, str]) -> list[str]:
    from vlarl_ray.models.tokenizer import PromptTokenizer

    path, most = source / "tokenizer.json", cfg.model.max_prompt_tokens
    if not path.exists():  # a policy without prompts
        return []
    tokenizer = PromptTokenizer.load(path, cfg.model.prompt_style)
    lengths = {task_id: len(tokenizer.encode(text)) for task_id, text in wanted.items()}
    return [
        f"env.tasks: the instruction of {task_id!r}, {wanted[task_id]!r}, makes a prompt of {length} tokens, but "
        f"model.max_prompt_tokens = {most}; leave the task out, or raise that, in the config.json of a policy folder "
        "(padding changes no result)."
        for task_id, length in lengths.items()
        if length > most
    ]
