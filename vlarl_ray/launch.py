"""Wire a run: the only place that knows every component, with Ray or without it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_loader import ConfigError, config_to_json, run_dir_of
from vlarl_ray.demos.expert import expert_reference
from vlarl_ray.envs import make_suite
from vlarl_ray.envs.base import Suite
from vlarl_ray.files import write_whole
from vlarl_ray.recorder import RunRecorder
from vlarl_ray.rollout.ledger import EpisodePool, InlinePool, RolloutLedger
from vlarl_ray.rollout.tasks import TaskSampler
from vlarl_ray.run_folder import check_evaluation_dir, check_run_dir, sole_writer
from vlarl_ray.summary import PeakMemory, RunSummary, describe_machine, installed_versions
from vlarl_ray.transport import LocalTransport, Transport
from vlarl_ray.vllm_checks import serves_on_gpu

_LOG = logging.getLogger(__name__)

TRAINED_POLICY = "policy_final"
"""Folder of a run folder with the trained policy, merged."""


@dataclass(frozen=True)
class Processes:
    """Where episodes, servers and learner ranks run."""

    pool: EpisodePool
    servers: list[Any]
    ranks: list[Any]
    transport: Transport
    sinks: list[Any]
    process_ids: list[int]
    keeper: Any = None
    """Restarts servers that are lost; None where everything is one process."""


def run_training(cfg: ExperimentConfig, *, inline: bool, resume: bool) -> int:
    """Run the whole experiment: warm start, evaluation, RL, evaluation, report.

    Args:
        cfg: A checked config.
        inline: Run everything in this process, without Ray.
        resume: Continue the run that is in the run folder.

    Returns:
        Exit code 0; 128 plus the signal's number where a signal ended the run early.

    Raises:
        ClusterTooSmallError: Before anything is written, if the cluster cannot hold the run.
    """
    from vlarl_ray.report.html import write_report
    from vlarl_ray.train import train
    from vlarl_ray.trained_policy import save_trained_policy
    from vlarl_ray.warm_start import check_instructions

    cfg = with_policys_model(cfg)
    suite = make_suite(cfg.env)
    check_instructions(cfg, suite)
    if inline or cfg.policy is None:
        check_simulator(cfg, suite)
    if not inline:
        check_server_memory(cfg)
    start = time.perf_counter()
    with ExitStack() as stack:
        if not inline:
            join_ray(cfg, stack)
        stack.enter_context(sole_writer(run_dir_of(cfg)))
        run_dir = prepare_run_dir(cfg, is_training=True)
        memory = stack.enter_context(PeakMemory())
        policy_dir, summary = warm_start(cfg, suite, run_dir)
        where = stack.enter_context(processes(cfg, policy_dir, inline=inline, memory=memory))
        seconds_before = time.perf_counter() - start
        recorder = RunRecorder(
            run_dir,
            cfg,
            suite,
            summary=summary,
            memory=memory,
            sinks=where.sinks,
            resume=resume,
            seconds_before=seconds_before,
        )
        stack.callback(recorder.close)
        stack.enter_context(recorder.stop_on_signals())
        system = build_system(cfg, suite, where, recorder)
        seed_buffer(cfg, system, run_dir)
        version = train(cfg, system)
        if recorder.stop_signal is None:
            [update] = where.transport.fetch([system.learner.weight_update(version)[0]])
            save_trained_policy(policy_dir, update, run_dir / TRAINED_POLICY)
    recorder.write_summary()
    _LOG.info("report: %s", write_report(str(run_dir)))
    return recorder.exit_code


def run_collect(cfg: ExperimentConfig) -> int:
    """Collect demonstrations into the run folder."""
    from vlarl_ray.warm_start import demonstrations

    suite = make_suite(cfg.env)
    check_simulator(cfg, suite)
    with sole_writer(run_dir_of(cfg)):
        demos = demonstrations(cfg, suite, prepare_run_dir(cfg))
    _LOG.info("%d demonstrations, %d env steps", len(demos), sum(len(demo.actions) for demo in demos))
    return 0


def run_sft(cfg: ExperimentConfig) -> int:
    """Collect demonstrations and fine-tune a policy on them, into the run folder."""
    suite = make_suite(cfg.env)
    check_simulator(cfg, suite)
    with sole_writer(run_dir_of(cfg)):
        policy_dir, _ = warm_start(cfg, suite, prepare_run_dir(cfg))
    _LOG.info("policy: %s", policy_dir)
    return 0


def run_evaluate(cfg: ExperimentConfig, policy: str) -> int:
    """Evaluate a policy folder on the held-out initial states, without Ray; nothing of a run in the folder changes.

    The result goes to a new file `evaluation-<number>.json` of the run folder.

    Raises:
        ConfigError: If the folder is that of a run on another env, or the policy's dimensions are not the simulator's.
    """
    from vlarl_ray.evaluate import evaluate
    from vlarl_ray.warm_start import check_instructions, given_policy

    problems = check_evaluation_dir(cfg)
    if problems:
        raise ConfigError([problem.message for problem in problems])
    cfg = with_policys_model(replace(cfg, policy=policy))
    suite = make_suite(cfg.env)
    check_instructions(cfg, suite)
    check_simulator(cfg, suite)
    with ExitStack() as stack:
        memory = stack.enter_context(PeakMemory())
        policy_dir = given_policy(cfg, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        where = stack.enter_context(processes(cfg, policy_dir, inline=True, memory=memory, evaluates_only=True))
        system = build_system(cfg, suite, where, recorder=None)
        system.weights.publish(0)
        result = evaluate(cfg.evaluation, system, version=0).result
    run_dir = Path(run_dir_of(cfg))
    run_dir.mkdir(parents=True, exist_ok=True)
    path = next(p for n in itertools.count() if not (p := run_dir / f"evaluation-{n}.json").exists())
    write_whole(path, json.dumps({"policy": policy, **result.to_dict()}, indent=2) + "\n")
    _LOG.info(
        "%s: success %.3f [%.3f, %.3f], %d episodes, %s; %s",
        policy, result.success_rate, result.ci_low, result.ci_high, result.episodes, result.split, path,
    )  # fmt: skip
    return 0


def check_simulator(cfg: ExperimentConfig, suite: Suite) -> None:
    """Build one simulator and close it, so that what does not fit is noticed before anything is written.

    Raises:
        ValueError: From the suite, saying what this machine lacks (for example `GLUnavailableError`).
        ConfigError: If the model's dimensions are not the simulator's.
    """
    env = suite.make_env()
    env.close()
    has = f"the simulators of {cfg.env.suite} have"
    problems = []
    if cfg.model.action_dim != env.action_dim:
        advice = f"{has} {env.action_dim} action dimensions; set model.action_dim to that"
        problems.append(f"model.action_dim = {cfg.model.action_dim}: {advice}.")
    if cfg.model.proprio_dim not in (0, env.proprio_dim):
        advice = f"{has} {env.proprio_dim} proprioception dimensions; set model.proprio_dim to that, or to 0"
        problems.append(f"model.proprio_dim = {cfg.model.proprio_dim}: {advice}.")
    if problems:
        raise ConfigError(problems)


def check_server_memory(cfg: ExperimentConfig) -> None:
    """Check that a GPU can hold a server on vLLM, where its size is known: named, or that of this machine's GPU.

    A server checks the GPU that it gets, too.

    Raises:
        ConfigError: With the arithmetic.
    """
    if not serves_on_gpu(cfg):
        return
    import torch

    from vlarl_ray.memory_plan import vllm_need

    gpu_bytes = cfg.cluster.gpu_bytes
    starts_here = not (cfg.cluster.address or os.environ.get("RAY_ADDRESS"))
    if gpu_bytes is None and starts_here and torch.cuda.is_available():
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    needs, problem = vllm_need(cfg, gpu_bytes=gpu_bytes)
    if problem is not None:
        raise ConfigError([problem])
    if gpu_bytes is None:
        _LOG.info("a server needs %s GiB of a GPU; set cluster.gpu_bytes to have that checked before the start", needs)


def prepare_run_dir(cfg: ExperimentConfig, *, is_training: bool = False) -> Path:
    """Create the run folder and record the resolved config in it; only training replaces a config that is there.

    Raises:
        ConfigError: If the folder holds a run with another configuration, whose files would be taken for this one's.
    """
    problems = check_run_dir(cfg, resume=True)
    if problems:
        raise ConfigError([problem.message for problem in problems])
    run_dir = Path(run_dir_of(cfg))
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.json"
    if is_training or not path.exists():
        write_whole(path, config_to_json(cfg))
    return run_dir


def warm_start(cfg: ExperimentConfig, suite: Suite, run_dir: Path) -> tuple[Path, RunSummary]:
    """Provide the policy to improve: the given one, or one fine-tuned on scripted demonstrations."""
    if cfg.policy is not None:
        from vlarl_ray.warm_start import given_policy

        policy_dir = given_policy(cfg, run_dir / "policy")
    else:
        from vlarl_ray.warm_start import demonstrations, fine_tuned_policy

        policy_dir = fine_tuned_policy(cfg, suite, demonstrations(cfg, suite, run_dir), run_dir)
    expert = expert_reference(cfg.env, states_per_task=cfg.evaluation.states_per_task, path=run_dir / "expert.json")
    summary = new_summary(policy_dir)
    if expert is None:
        return policy_dir, summary
    return policy_dir, replace(
        summary,
        expert_success_rate=expert.success_rate,
        expert_steps_to_success=expert.steps_to_success,
        expert_steps_to_success_per_task=expert.steps_to_success_per_task,
    )


def seed_buffer(cfg: ExperimentConfig, system: Any, run_dir: Path) -> None:
    """Give the run's demonstrations to an algorithm that wants some; a restored checkpoint replaces them."""
    seed_demonstrations = getattr(system.algorithm, "seed_demonstrations", None)
    path = Path(cfg.demos.path) if cfg.demos.path is not None else run_dir / "demos"
    if seed_demonstrations is None or cfg.algorithm.self_bc.seed_demos == 0:
        return
    if not path.is_dir():
        _LOG.info("no demonstrations in %s: the self-cloning buffer starts empty", path)
        return
    from vlarl_ray.warm_start import stored_demonstrations

    seed_demonstrations(stored_demonstrations(cfg, system.suite, path, system.transport.put))


def with_policys_model(cfg: ExperimentConfig) -> ExperimentConfig:
    """Take the model config from the policy the run starts from, where it starts from one."""
    if cfg.policy is None:
        return cfg
    from vlarl_ray.warm_start import check_policy

    return replace(cfg, model=check_policy(cfg, Path(cfg.policy)))


def new_summary(policy_dir: Path) -> RunSummary:
    """Start a summary with what is known before the run."""
    from vlarl_ray.models.policy import policy_weights

    return RunSummary(
        model_bytes=policy_weights(policy_dir).num_bytes,
        versions=installed_versions(),
        machine=describe_machine(),
    )


def join_ray(cfg: ExperimentConfig, stack: ExitStack) -> None:
    """Start or join Ray, and check that it is large enough."""
    import ray

    from vlarl_ray.remote.cluster import check_resources, connect

    connect(cfg)
    stack.callback(ray.shutdown)
    check_resources(cfg, ray.cluster_resources(), elastic=cfg.cluster.elastic)


@contextmanager
def processes(
    cfg: ExperimentConfig, policy_dir: Path, *, inline: bool, memory: PeakMemory, evaluates_only: bool = False
) -> Iterator[Processes]:
    """Start env workers, servers and learner ranks; end them on leaving, however the run ends. Ray must be joined."""
    with ExitStack() as stack:
        if inline:
            where = _inline_processes(cfg, policy_dir, stack, evaluates_only=evaluates_only)
        else:
            where = _ray_processes(cfg, policy_dir, stack)
        memory.watch(where.process_ids)
        yield where


def _ray_processes(cfg: ExperimentConfig, policy_dir: Path, stack: ExitStack) -> Processes:
    from vlarl_ray.remote.metrics_sink import RayMetricsSink
    from vlarl_ray.remote.system import build_remote

    remote = build_remote(cfg, str(policy_dir.resolve()))
    stack.callback(remote.close)
    return Processes(
        remote.pool,
        remote.servers,
        remote.ranks,
        remote.transport,
        [RayMetricsSink(cfg.name)],
        remote.process_ids(),
        remote.keeper,
    )


def _inline_processes(cfg: ExperimentConfig, policy_dir: Path, stack: ExitStack, *, evaluates_only: bool) -> Processes:
    import torch

    from vlarl_ray.inference.base import DirectClient, make_engine
    from vlarl_ray.learner.build import build_learner
    from vlarl_ray.rollout.env_worker import EnvWorker

    torch.set_num_threads(cfg.learner.num_threads)
    if cfg.learner.num_ranks > 1 and not evaluates_only:
        _LOG.info(
            "--inline: one learner rank instead of %d; the update is the same up to rounding", cfg.learner.num_ranks
        )
    if "cuda" in (cfg.inference.device, cfg.learner.device):
        _LOG.warning("one process, without Ray, runs on CPUs; inference.device and learner.device = cuda are not used")
    engine = make_engine(cfg, policy_dir)
    stack.callback(engine.close)
    num_envs = cfg.rollout.num_workers * cfg.rollout.envs_per_worker
    worker = EnvWorker(make_suite(cfg.env).make_env, DirectClient(engine), num_envs=num_envs)
    stack.callback(worker.close)
    address = ("127.0.0.1", _free_port())
    learner = build_learner(cfg, policy_dir, rank=0, world_size=1, store_address=address, evaluates_only=evaluates_only)
    stack.callback(learner.shutdown)
    return Processes(InlinePool(worker, capacity=num_envs + 2), [engine], [learner], LocalTransport(), [], [])


def build_system(cfg: ExperimentConfig, suite: Suite, where: Processes, recorder: RunRecorder | None) -> Any:
    """Connect the components; the result is what `train` and `evaluate` work on."""
    from vlarl_ray.learner.group import LearnerGroup
    from vlarl_ray.memory_check import MemoryCheck
    from vlarl_ray.registry import ALGORITHMS, MODELS, resolve
    from vlarl_ray.train import System
    from vlarl_ray.weights.canary import make_probe
    from vlarl_ray.weights.publisher import WeightPublisher

    learner = LearnerGroup(where.ranks, where.transport, deadline_s=cfg.learner.deadline_s)
    ledger = RolloutLedger(where.pool, max_attempts=cfg.rollout.max_attempts)
    if recorder is not None:
        recorder.counters = ledger.counters
    architecture = resolve(MODELS, cfg.model.architecture, what="model.architecture")
    num_tokens, token_ids = architecture.sample_space(cfg.model)
    probe = make_probe(
        [suite.instruction(task_id) for task_id in suite.task_ids],
        image_shape=(cfg.model.num_cameras, cfg.env.image_size, cfg.env.image_size, 3),
        proprio_dim=suite.proprio_dim,
        token_ids=token_ids,
        num_tokens=num_tokens,
        seed=cfg.seed,
    )
    publisher = WeightPublisher(
        learner,
        where.servers,
        where.transport,
        probe=probe,
        tolerance=cfg.trust.canary_tolerance,
        deadline_s=cfg.inference.deadline_s,
        keeper=where.keeper,
        delivery=_delivery(cfg, where),
    )
    if where.keeper is not None:
        where.keeper.republish = publisher.republish
    run_id = f"{cfg.name}-seed{cfg.seed}"
    return System(
        cfg=cfg,
        suite=suite,
        sampler=TaskSampler(suite, cfg, run_id=run_id),
        ledger=ledger,
        algorithm=resolve(ALGORITHMS, cfg.algorithm.name, what="algorithm.name")(cfg.algorithm),
        learner=learner,
        weights=publisher,
        recorder=recorder,
        transport=where.transport,
        memory=MemoryCheck(cfg, learner, num_ranks=len(where.ranks), proprio_dim=suite.proprio_dim),
    )


def _delivery(cfg: ExperimentConfig, where: Processes) -> Any:
    """Make what brings weights to servers; None, in one process too, for the object store."""
    from vlarl_ray.weights.delivery import BroadcastDelivery

    if cfg.inference.weight_transport == "object_store":
        return None
    if where.keeper is None:
        _LOG.info("--inline: nothing to broadcast in one process; inference.weight_transport is not used")
        return None
    return BroadcastDelivery(
        where.ranks[0],
        where.servers,
        where.transport,
        deadline_s=cfg.inference.deadline_s,
        restarts=lambda: where.keeper.restarts,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
