"""Checks of the `env` section against what is known of each built-in suite; loads no simulator."""

from __future__ import annotations

from collections.abc import Iterator

from vlarl_ray import libero_tasks, metaworld_tasks
from vlarl_ray.config import EnvConfig, ExperimentConfig
from vlarl_ray.registry import suggest

FieldsAndMessage = tuple[tuple[str, ...], str]
"""Dotted paths of the fields compared, and a message: field, value, what is allowed, what to do."""


def env_problems(cfg: ExperimentConfig) -> Iterator[FieldsAndMessage]:
    """Find contradictions within `env`, and between it and what the policy and the evaluation want."""
    env = cfg.env
    if not env.tasks:
        advice = "write [all]" if env.suite in libero_tasks.TASKS else "leave it out for three easy ones"
        yield ("env.tasks",), f"env.tasks = []: must name at least one task; {advice}."
    tasks = expanded_tasks(env)
    for task in sorted({task for task in tasks if tasks.count(task) > 1}):
        sets = "all is a set" if env.suite in libero_tasks.TASKS else "mt10 and mt50 are sets"
        yield ("env.tasks",), f"env.tasks names {task!r} more than once; name it once ({sets})."
    if env.train_seed == env.eval_seed:
        message = f"must differ from env.train_seed = {env.train_seed}, or no goal is held out; set another seed"
        yield ("env.eval_seed", "env.train_seed"), f"env.eval_seed = {env.eval_seed}: {message}."
    if not env.cameras:
        yield ("env.camera",), "env.camera = []: must name at least one camera; leave it out for Meta-World's corner2."
    if cfg.policy is None:  # else it comes with the policy, which is looked at later
        yield from camera_problems(cfg)
    if env.assets is not None and env.suite not in libero_tasks.TASKS:
        yield ("env.assets", "env.suite"), f"env.assets = {env.assets!r}: {env.suite} has none; leave it out."
    if env.suite == "metaworld":
        yield from _metaworld_problems(cfg)
    elif env.suite in libero_tasks.TASKS:
        yield from _libero_problems(cfg)


def camera_problems(cfg: ExperimentConfig) -> Iterator[FieldsAndMessage]:
    """Find out whether an observation has as many frames as the policy takes."""
    wanted, there = cfg.model.num_cameras, len(cfg.env.cameras)
    if wanted == there or not there:
        return
    path = {"quest": "model.quest.cameras", "openvla_oft": "model.oft.num_cameras"}.get(cfg.model.architecture)
    frames = f"{wanted} frame{'s' * (wanted != 1)}"
    names = f"env.camera names {there} camera{'s' * (there != 1)} ({', '.join(cfg.env.cameras)})"
    advice = f"name as many in env.camera, in the policy's order{f', or mend {path}' if path else ''}"
    fields = ("env.camera", "model.architecture", *([path] if path else []))
    yield fields, f"{names}, but a policy of {cfg.model.architecture} takes {frames} an observation; {advice}."


def expert_problems(cfg: ExperimentConfig) -> Iterator[FieldsAndMessage]:
    """Find out whether a run can start: LIBERO has no scripted expert to learn a first policy from."""
    if cfg.policy is None and cfg.demos.path is None and cfg.env.suite in libero_tasks.TASKS:
        advice = "name the policy folder or published checkpoint to start from (--policy FOLDER), or a demos.path"
        fields = ("policy", "env.suite", "demos.path")
        yield fields, f"policy = null: {cfg.env.suite} has no scripted expert to collect demonstrations with; {advice}."


def expanded_tasks(env: EnvConfig) -> tuple[str, ...]:
    """Replace names of sets of tasks (`mt10`, `all`) by the tasks."""
    if env.suite == "metaworld":
        return metaworld_tasks.expand_tasks(env.tasks)
    return libero_tasks.expand_tasks(env.suite, env.tasks) if env.suite in libero_tasks.TASKS else env.tasks


def _metaworld_problems(cfg: ExperimentConfig) -> Iterator[FieldsAndMessage]:
    env = cfg.env
    for task in metaworld_tasks.expand_tasks(env.tasks):
        if task not in metaworld_tasks.MT50:
            advice = suggest(task, [*metaworld_tasks.MT50, "mt10", "mt50"])
            yield ("env.tasks", "env.suite"), f"env.tasks: {task!r} is no Meta-World task; {advice}."
    yield from _known_cameras(cfg, metaworld_tasks.CAMERAS, "Meta-World")
    if env.max_env_steps > metaworld_tasks.MAX_ENV_STEPS:
        allowed = f"Meta-World allows at most {metaworld_tasks.MAX_ENV_STEPS}; lower it"
        yield ("env.max_env_steps", "env.suite"), f"env.max_env_steps = {env.max_env_steps}: {allowed}."
    yield from _action_dim(cfg, metaworld_tasks.ACTION_DIM, "Meta-World")
    available = metaworld_tasks.NUM_INIT_STATES
    yield from _held_out_states(cfg, available, "Meta-World")
    sets = env.options.get("num_train_sets", 1)
    wanted = cfg.demos.episodes_per_task
    if isinstance(sets, int) and cfg.demos.path is None and cfg.demos.action_noise == 0 and wanted > available * sets:
        path = "demos.episodes_per_task"
        advice = (
            f"{available * sets} training initial states give as many different demonstrations without noise; set at "
            "most that, raise env.options.num_train_sets, or set demos.action_noise > 0"
        )
        yield (path, "env.suite", "env.options", "demos.action_noise"), f"{path} = {wanted}: {advice}."


def _libero_problems(cfg: ExperimentConfig) -> Iterator[FieldsAndMessage]:
    env, model = cfg.env, cfg.model
    known = libero_tasks.TASKS[env.suite]
    for task in libero_tasks.expand_tasks(env.suite, env.tasks):
        if task not in known:
            advice = suggest(task, [*known, "all"])
            yield ("env.tasks", "env.suite"), f"env.tasks: {task!r} is no task of {env.suite}; {advice}."
    yield from _known_cameras(cfg, libero_tasks.CAMERAS, "LIBERO")
    yield from _action_dim(cfg, libero_tasks.ACTION_DIM, "LIBERO")
    yield from _held_out_states(cfg, libero_tasks.NUM_INIT_STATES, "LIBERO")
    name = env.options.get("protocol", "openvla")
    if name not in libero_tasks.PROTOCOLS:
        fields = ("env.options", "env.suite")
        yield fields, f"env.options.protocol = {name!r} is unknown; {suggest(str(name), libero_tasks.PROTOCOLS)}."
        return
    protocol = libero_tasks.PROTOCOLS[name]
    if model.proprio_dim not in (0, protocol.proprio_dim) and cfg.policy is None:
        held = ", ".join(f"{entry} ({size})" for entry, size in protocol.proprio)
        advice = f"protocol {name} has {protocol.proprio_dim}: {held}; set that, 0, or another env.options.protocol"
        fields = ("model.proprio_dim", "env.suite", "env.options")
        yield fields, f"model.proprio_dim = {model.proprio_dim}: {advice}."
    if protocol.is_rotated and "rotate180" in model.preprocessing.frame_steps:
        path = "model.preprocessing.frame_steps"
        advice = f"frames of {env.suite} come turned already (env.options.protocol = {name}); leave rotate180 out"
        yield (path, "env.suite", "env.options"), f"{path} names rotate180, but {advice}."


def _known_cameras(cfg: ExperimentConfig, known: tuple[str, ...], simulator: str) -> Iterator[FieldsAndMessage]:
    for camera in cfg.env.cameras:
        if camera not in known:
            message = f"env.camera = {camera!r} is no {simulator} camera; {suggest(camera, known)}."
            yield ("env.camera", "env.suite"), message


def _action_dim(cfg: ExperimentConfig, wanted: int, simulator: str) -> Iterator[FieldsAndMessage]:
    if cfg.model.action_dim != wanted and cfg.policy is None:
        message = (
            f"model.action_dim = {cfg.model.action_dim}: {simulator} has {wanted} action dimensions; set {wanted}."
        )
        yield ("model.action_dim", "env.suite"), message


def _held_out_states(cfg: ExperimentConfig, available: int, simulator: str) -> Iterator[FieldsAndMessage]:
    path, wanted = "evaluation.states_per_task", cfg.evaluation.states_per_task
    if wanted > available:
        advice = (
            f"{simulator} has {available} held-out initial states a task, each counted once; set at most {available}"
        )
        yield (path, "env.suite"), f"{path} = {wanted}: {advice}."
