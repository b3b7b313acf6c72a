"""Configs: every broken one is refused before anything starts, with a message a user can act on (F63)."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest
import yaml

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_checks import check_config
from vlarl_ray.config_fields import field_docs, format_fields, section_sentences
from vlarl_ray.config_loader import ConfigError, config_from_json, config_to_json, load_config
from vlarl_ray.metaworld_tasks import CAMERAS, MT10, MT50, expand_tasks
from vlarl_ray.run_folder import run_dir_of


def problems(*overrides, preset=None, purpose="other"):
    with pytest.raises(ConfigError) as caught:
        load_config(preset, overrides, purpose=purpose)
    return caught.value.problems


def write(folder, text):
    path = folder / "preset.yaml"
    path.write_text(text)
    return str(path)


def test_the_defaults_are_valid():
    assert load_config(None, []) == ExperimentConfig()


def test_overrides_win_over_the_preset_and_both_over_defaults(tmp_path):
    preset = write(tmp_path, "seed: 3\nalgorithm: {gamma: 0.9, clip_ratio_low: 0.1}\nenv: {tasks: [mt10]}\n")
    cfg = load_config(
        preset, ["--algorithm.gamma", "0.5", "--env.image-size=32", "--model.value_hidden_sizes", "[8, 4]"]
    )
    assert (cfg.seed, cfg.algorithm.gamma, cfg.algorithm.clip_ratio_low) == (3, 0.5, 0.1)
    assert (cfg.env.image_size, cfg.env.tasks, cfg.model.value_hidden_sizes) == (32, ("mt10",), (8, 4))
    assert cfg.algorithm.gae_lambda == ExperimentConfig().algorithm.gae_lambda


def test_exponents_without_a_dot_are_numbers(tmp_path):
    cfg = load_config(write(tmp_path, "learner: {actor_learning_rate: 1e-3}"), ["--sft.learning_rate", "2E-4"])
    assert (cfg.learner.actor_learning_rate, cfg.sft.learning_rate) == (1e-3, 2e-4)


def test_text_fields_take_the_word_as_it_stands_and_null_as_nothing():
    cfg = load_config(None, ["--name", "007", "--metrics.wandb_project", "null"])
    assert (cfg.name, cfg.metrics.wandb_project) == ("007", None)


def test_a_text_field_that_takes_lists_takes_a_word_or_a_list():
    assert load_config(None, ["--env.camera", "corner"]).env.cameras == ("corner",)
    cfg = load_config(None, [*TWO_CAMERAS, "--env.camera=[corner, topview]"])
    assert cfg.env.cameras == ("corner", "topview")
    assert config_from_json(config_to_json(cfg)) == cfg


QUEST = ["--model.architecture", "quest", "--algorithm.ratio_level", "token"]
RLOO = ["--algorithm.name", "rloo", "--rollout.group_size", "4", "--rollout.groups_per_update", "8"]
CHUNK_PPO = ["--algorithm.name", "chunk_ppo", "--rollout.max_inflight_bytes", str(2**29)]
GAUSSIAN = ["--model.architecture", "pixel_mlp", "--model.action_head", "gaussian"]
L1 = ["--model.architecture", "openvla_oft", "--model.action_head", "l1"]
TWO_CAMERAS = ["--model.architecture", "openvla_oft", "--model.oft.num_cameras", "2"]
BROKEN = {
    # types and ranges
    "text for a number": (["--seed", "abc"], "seed = 'abc': must be an integer >= 0"),
    "fraction for an integer": (["--sft.batch_size", "1.5"], "sft.batch_size = 1.5: must be an integer >= 1"),
    "true for an integer": (["--num_iterations", "true"], "num_iterations = True: must be an integer"),
    "number for true or false": (["--metrics.progress", "1"], "metrics.progress = 1: must be true or false"),
    "below the range": (["--checkpoint.keep", "1"], "checkpoint.keep = 1: must be an integer >= 2"),
    "negative": (
        ["--sft.batch_size", "-4"],
        "sft.batch_size = -4: must be an integer >= 1; mend it, or leave it out for 64",
    ),
    "outside an open range": (["--algorithm.gamma", "0"], "algorithm.gamma = 0: must be a number > 0 and <= 1"),
    "choice": (["--env.render_profile", "fst"], "env.render_profile = 'fst': must be one of fast, full"),
    "list entry": (
        ["--model.value_hidden_sizes", "[8, 0]"],
        "model.value_hidden_sizes[1] = 0: must be a list, each an integer",
    ),
    "word for a list": (["--env.tasks", "mt10"], "env.tasks = 'mt10': must be a list, each text"),
    "list too short": (["--learner.adam_betas", "[0.9]"], "learner.adam_betas = [0.9]: must be a list [a number >= 0"),
    "list too long": (
        ["--learner.adam_betas", "[0.9, 0.9, 0.9]"],
        "learner.adam_betas = [0.9, 0.9, 0.9]: must be a list",
    ),
    "null where a value is due": (["--env.suite", "null"], "env.suite = None: must be text"),
    "value for a section": (
        ["--checkpoint", "3"],
        "checkpoint = 3: is a section; give its fields by name (every_updates, keep)",
    ),
    "infinite": (["--sft.learning_rate", ".inf"], "sft.learning_rate = inf: must be finite"),
    "not a number": (["--sft.learning_rate", ".nan"], "sft.learning_rate = nan: must be a number > 0"),
    "lag": (["--rollout.max_policy_lag", "2"], "rollout.max_policy_lag = 2: must be an integer >= 0 and <= 1"),
    "seed too large": (["--seed", str(2**70)], "must be an integer >= 0 and < 4611686018427387904"),
    "decay of one": (["--learner.adam_betas", "[1, 0.9]"], "learner.adam_betas[0] = 1"),
    "empty value": (["--run_dir", ""], "run_dir = '': is empty (an unset variable?)"),
    "states that do not exist": (
        ["--evaluation.states_per_task", "51"],
        "evaluation.states_per_task = 51: Meta-World has 50 held-out initial states a task",
    ),
    "more demonstrations than states": (
        ["--demos.episodes_per_task", "51"],
        "demos.episodes_per_task = 51: 50 training initial states give as many",
    ),
    "plug-in that is not installed": (
        ["--algorithm.name", "nowhere.to_be:Found"],
        "algorithm.name = 'nowhere.to_be:Found': its module is not on the Python path",
    ),
    "control with a discount": (
        ["--rollout.shuffle_rewards", "true"],
        "algorithm.gamma = 0.99: rollout.shuffle_rewards needs 1",
    ),
    "band between two outcomes": (
        [*RLOO, "--sampling.dynamic", "true", "--sampling.min_success", "0.3", "--sampling.max_success", "0.4"],
        "sampling.min_success = 0.3, sampling.max_success = 0.4: no group of 4 lies between them",
    ),
    "band of uniform groups": (
        [*RLOO, "--sampling.dynamic", "true", "--sampling.min_success", "1.0"],
        "sampling.min_success = 1.0, sampling.max_success = 1.0: no group of 4 lies between them",
    ),
    "cloning above its bound": (
        ["--algorithm.self_bc.bc_weight", "20"],
        "algorithm.self_bc.bc_weight = 20.0: is above algorithm.self_bc.max_bc_weight = 10.0",
    ),
    "buffer full of pinned demonstrations": (
        [*CHUNK_PPO, "--algorithm.self_bc.pin_demos", "true", "--algorithm.self_bc.capacity", "10"],
        "algorithm.self_bc.pin_demos = true: fills algorithm.self_bc.capacity = 10 for good",
    ),
    "entropy of a continuous head as a factor": (
        [*CHUNK_PPO, *GAUSSIAN, "--algorithm.self_bc.schedule", "entropy_adaptive"],
        "algorithm.self_bc.schedule = entropy_adaptive: divides entropies",
    ),
    "control that clones true successes": (
        [*CHUNK_PPO, "--rollout.shuffle_rewards", "true", "--algorithm.gamma", "1"],
        "rollout.shuffle_rewards = true: is no control of chunk_ppo",
    ),
    "no group to compare in": (
        ["--algorithm.name", "rloo"],
        "rollout.group_size = 1: rloo compares the episodes of a group; set at least 2",
    ),
    "a critic compares nothing": (
        ["--algorithm.name", "chunk_ppo", "--rollout.group_size", "2"],
        "rollout.group_size = 2: chunk_ppo has a critic and compares nothing within a group; set 1",
    ),
    "dynamic sampling of groups of one": (
        ["--sampling.dynamic", "true"],
        "rollout.group_size = 1: sampling.dynamic rejects groups whose episodes all end alike",
    ),
    "band the wrong way round": (
        [
            "--sampling.dynamic",
            "true",
            "--algorithm.name",
            "rloo",
            "--rollout.group_size",
            "4",
            "--rollout.groups_per_update",
            "8",
            "--sampling.min_success",
            "0.9",
            "--sampling.max_success",
            "0.1",
        ],
        "sampling.min_success = 0.9: is above sampling.max_success = 0.1",
    ),
    "F63 early stop without dynamic sampling": (
        ["--sampling.early_stop_fraction", "0.8"],
        "sampling.early_stop_fraction = 0.8: has no effect without sampling.dynamic = true",
    ),
    "F63 a peer's misspelling": (
        ["--sampling.early_stop_porcentage", "0.8"],
        "sampling.early_stop_porcentage = 0.8: there is no such field; did you mean 'sampling.early_stop_fraction'?",
    ),
    "buffer smaller than its minimum": (
        ["--algorithm.self_bc.capacity", "5"],
        "algorithm.self_bc.min_fill = 10: is above algorithm.self_bc.capacity = 5",
    ),
    "run folder that is a file": (["--run_dir", "pyproject.toml"], "run_dir = 'pyproject.toml': is a file"),
    "demonstrations that are none": (["--demos.path", "jobs"], "demos.path = 'jobs': holds no demonstrations"),
    # names
    "F63 unknown key": (["--porcentage", "0.5"], "porcentage = 0.5: there is no such field"),
    "misspelt field": (
        ["--env.imag_size", "3"],
        "env.imag_size = 3: there is no such field; did you mean 'env.image_size'?",
    ),
    "misspelt section": (
        ["--enw.image_size", "3"],
        "enw = {'image_size': 3}: there is no such field; did you mean 'env'?",
    ),
    "wrong section": (["--rollout.num_ranks", "1"], "did you mean 'learner.num_ranks'?"),
    "misspelt in the wrong section": (["--rollout.num_rank", "1"], "did you mean 'learner.num_ranks'?"),
    "two levels": (["--model.dino.width", "8"], "model.dino.width = 8: there is no such field; "),
    "suite": (["--env.suite", "metawolrd"], "env.suite = 'metawolrd' is unknown; did you mean 'metaworld'?"),
    "algorithm": (["--algorithm.name", "pop"], "algorithm.name = 'pop' is unknown; did you mean 'ppo'?"),
    "model": (["--model.architecture", "opnvla"], "model.architecture = 'opnvla' is unknown; did you mean 'openvla'?"),
    "engine": (["--inference.engine", "troch"], "inference.engine = 'troch' is unknown; did you mean 'torch'?"),
    "task": (["--env.tasks", "[reach-v2]"], "env.tasks: 'reach-v2' is no Meta-World task; did you mean 'reach-v3'?"),
    "no task": (["--env.tasks", "[]"], "env.tasks = []: must name at least one task"),
    "task twice": (["--env.tasks", "[mt10, reach-v3]"], "env.tasks names 'reach-v3' more than once"),
    "camera": (["--env.camera", "corner9"], "env.camera = 'corner9' is no Meta-World camera; did you mean 'corner"),
    "name that is a path": (["--name", "a/../b"], "name = 'a/../b': becomes a folder"),
    "regular expression": (["--learner.lora.target_modules", "(q"], "learner.lora.target_modules = '(q' is no regular"),
    # the command line itself
    "no value": (["--seed"], "--seed has no value; write --seed value"),
    "no value before another": (["--seed", "--name", "x"], "--seed has no value"),
    "stray word": (["seed"], "'seed' is out of place; write --section.field value"),
    "bad YAML": (["--env.tasks", "[a"], "env.tasks = '[a' is not YAML"),
    "YAML tag": (
        ["--env.options", "!!python/object/apply:os.getcwd []"],
        "is not YAML: could not determine a constructor",
    ),
    # one field against another
    "odd envs": (["--rollout.envs_per_worker", "3"], "rollout.envs_per_worker = 3: must be even, as one half steps"),
    "attention heads": (
        ["--model.hidden_size", "130"],
        "model.hidden_size = 130: must be a multiple of model.num_heads = 4",
    ),
    "kv heads": (["--model.num_kv_heads", "3"], "model.num_heads = 4: must be a multiple of model.num_kv_heads = 3"),
    "rotary heads": (
        ["--model.hidden_size", "20"],
        "gives heads of 5, but rotary embeddings need an even size; set 40",
    ),
    "patches": (
        ["--model.patch_size", "7"],
        "model.image_size = 64: must be a multiple of model.patch_size = 7; set model.image_size to 63",
    ),
    "tower": (["--model.siglip.dim", "65"], "model.siglip.dim = 65: must be a multiple of model.siglip.num_heads = 4"),
    "oft settings of another model": (
        ["--model.oft.passes", "two"],
        "model.oft.passes = two: is for openvla_oft, not openvla; leave it out",
    ),
    "oft decoding": (
        ["--model.architecture", "openvla_oft", "--model.decoding", "autoregressive"],
        "model.decoding = autoregressive: openvla_oft predicts the whole chunk at once; set parallel",
    ),
    "oft stop token": (
        ["--model.architecture", "openvla_oft", "--model.oft.stop_token_id", "511"],
        "model.oft.stop_token_id = 511: is no text id; set one below model.text_vocab_size = 511",
    ),
    "oft detached prompt": (
        ["--model.architecture", "openvla_oft", "--model.oft.detach_prompt", "true"],
        "model.oft.detach_prompt = true: needs a pass of its own for the prompt; set model.oft.passes to two",
    ),
    "oft frames": (
        [*TWO_CAMERAS, "--env.camera", "[corner, corner2]", "--rollout.max_inflight_bytes", "1"],
        "an update holds up to 3960 frames of 64x64x3 = 48660480 bytes",
    ),
    "one camera for two": (
        TWO_CAMERAS,
        "env.camera names 1 camera (corner2), but a policy of openvla_oft takes 2 frames an observation; name as many "
        "in env.camera, in the policy's order, or mend model.oft.num_cameras.",
    ),
    "two cameras for one": (
        ["--env.camera", "[corner, corner2]"],
        "env.camera names 2 cameras (corner, corner2), but a policy of openvla takes 1 frame an observation",
    ),
    "no camera": (["--env.camera", "[]"], "env.camera = []: must name at least one camera"),
    "second camera": (
        [*QUEST, "--model.quest.cameras", "[a, b]", "--env.camera", "[corner2, corner9]"],
        "env.camera = 'corner9' is no Meta-World camera; did you mean 'corner",
    ),
    "chunk": (["--model.chunk_length", "161"], "model.chunk_length = 161: a chunk is longer than an episode"),
    "ppo group": (["--rollout.group_size", "4"], "rollout.group_size = 4: ppo has a critic"),
    "minibatches": (
        ["--algorithm.num_minibatches", "31"],
        "algorithm.num_minibatches = 31: an update is sure of 60 rows for learner.num_ranks = 2; set at most 30",
    ),
    "ranks": (["--learner.num_ranks", "61"], "learner.num_ranks = 61: an update has 60 episodes"),
    "warm-up": (["--num_iterations", "1"], "algorithm.critic_warmup_updates = 1: covers all num_iterations = 1"),
    "goal seeds": (["--env.eval_seed", "42"], "env.eval_seed = 42: must differ from env.train_seed = 42"),
    "horizon": (["--env.max_env_steps", "501"], "env.max_env_steps = 501: Meta-World allows at most 500"),
    "action dimensions": (["--model.action_dim", "7"], "model.action_dim = 7: Meta-World has 4 action dimensions"),
    "frames": (
        ["--rollout.max_inflight_bytes", "24330239"],
        "rollout.max_inflight_bytes = 24330239: an update holds up to 1980 frames of 64x64x3 = 24330240 bytes",
    ),
    "object store": (
        ["--cluster.object_store_bytes", "100000000"],
        "more than cluster.object_store_bytes = 100000000, so frames would spill",
    ),
    "deterministic threads": (
        ["--trust.deterministic", "true", "--inference.num_threads", "2"],
        "inference.num_threads = 2: trust.deterministic needs 1",
    ),
    "deterministic GPU": (
        ["--trust.deterministic", "true", "--cluster.gpus_per_server", "1"],
        "cluster.gpus_per_server = 1.0: trust.deterministic needs 0",
    ),
    "GPU not reserved": (
        ["--learner.device", "cuda"],
        "learner.device = cuda: reserves no GPU, as cluster.gpus_per_rank = 0",
    ),
    "GPU left idle": (
        ["--inference.device", "cpu", "--cluster.gpus_per_server", "1"],
        "inference.device = cpu: would leave the reserved GPU idle",
    ),
    "shared GPU": (["--cluster.gpus_per_rank", "0.5"], "cluster.gpus_per_rank = 0.5: a rank drives exactly one GPU"),
    "OSMesa on a GPU": (
        ["--env.gl_backend", "osmesa", "--cluster.gpus_per_worker", "0.1"],
        "env.gl_backend = osmesa: renders on the CPU",
    ),
    "two precisions": (
        ["--learner.dtype", "bfloat16"],
        "inference.dtype = float32, learner.dtype = bfloat16: must equal",
    ),
    "a hung server": (
        ["--inference.deadline_s", "120"],
        "inference.deadline_s = 120: the workers of a server that hangs return nothing either",
    ),
    "reference of a full model": (
        ["--learner.train", "full", "--algorithm.kl_coef", "0.1"],
        "algorithm.kl_coef = 0.1 with learner.train = full",
    ),
    "separate critic of a full model": (
        ["--learner.train", "full", "--learner.critic", "separate"],
        "learner.critic = separate with learner.train",
    ),
    "quest's ratio": (
        ["--model.architecture", "quest"],
        "algorithm.ratio_level = action: quest's codes are of the chunk as a whole",
    ),
    "quest's sizes": (
        [*QUEST, "--model.quest.prior_dim", "50"],
        "model.quest.prior_dim = 50: must be a multiple of model.quest.prior_heads = 4; set 48",
    ),
    "quest's proprioception": (
        [*QUEST, "--model.quest.lowdim", "[[gripper, 1], [position, 3]]"],
        "model.proprio_dim = 0: must be 4, the sum of the sizes in model.quest.lowdim",
    ),
    "quest's frames": (
        [*QUEST, "--model.preprocessing.frame_steps", "[jpeg]"],
        "model.preprocessing is not for quest, which resizes frames in its own way",
    ),
    "quest's cameras": (
        [*QUEST, "--model.oft.num_cameras", "2"],
        "model.oft.num_cameras = 2: is for openvla_oft, not quest",
    ),
    "quest's lists": (
        [*QUEST, "--model.quest.lowdim", "[gripper]"],
        "model.quest.lowdim[0] = 'gripper': must be a list, each a list [text, an integer >= 1]",
    ),
    # this machine
    "remote run folder": (["--run-dir", "s3://bucket/run"], "run_dir = 's3://bucket/run': is a URI"),
    "policy folder": (["--policy", "/nonexistent/policy"], "policy = '/nonexistent/policy': no such folder"),
    "demonstrations": (["--demos.path", "/nonexistent/demos"], "demos.path = '/nonexistent/demos': no such folder"),
}


def test_tolerances_of_float32_are_refused_in_bfloat16():
    words = ["--learner.dtype", "bfloat16", "--inference.dtype", "bfloat16"]
    messages = problems(*words)
    assert [message.partition(":")[0] for message in messages] == [
        "trust.canary_tolerance = 0.0001",
        "trust.sampler_ratio_tolerance = 0.0001",
    ]
    load_config(None, [*words, "--trust.canary_tolerance", "0.5", "--trust.sampler_ratio_tolerance", "0.5"])


def test_quest_computes_in_float32():
    tolerances = ["--trust.canary_tolerance", "0.5", "--trust.sampler_ratio_tolerance", "0.5"]
    messages = problems(*QUEST, *tolerances, "--learner.dtype", "bfloat16", "--inference.dtype", "bfloat16")
    assert [message.partition(":")[0] for message in messages] == [
        "learner.dtype = bfloat16",
        "inference.dtype = bfloat16",
    ]


def test_an_algorithm_without_a_critic_needs_no_update_after_the_critics_warm_up():
    load_config(None, [*RLOO, "--num_iterations", "1"])


def test_an_action_head_without_likelihood_is_refused_before_training_only():
    assert "model.action_head = l1: has no likelihood" in problems(*L1, purpose="train")[0]
    load_config(None, L1)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_is_refused_by_one_precise_message(case):
    overrides, expected = BROKEN[case]
    found = problems(*overrides)
    assert len(found) == 1, found
    assert expected in found[0]
    assert found[0].endswith((".", "?"))


def test_suites_of_your_own_have_tasks_of_their_own():
    args = ["--env.suite", "vlarl_ray.envs.toy:ToySuite", "--env.tasks", "[stack]", "--env.camera", "top"]
    cfg = load_config(None, [*args, "--env.max_env_steps", "900", "--model.action_dim", "7"])
    assert cfg.env.tasks == ("stack",)


def test_the_largest_plan_that_fits_is_accepted():
    load_config(None, ["--rollout.max_inflight_bytes", "24330240", "--algorithm.num_minibatches", "30"])


def test_all_errors_come_at_once(tmp_path):
    preset = write(tmp_path, "env: {suite: metawolrd, imag_size: 3}\nmodel: {hidden_size: 130}\nnum_ranks: 2\n")
    found = problems("--seed", "x", "--rollout.envs_per_worker", "3", "--learner.device", "cuda", preset=preset)
    named = (
        "env.suite",
        "env.imag_size",
        "model.hidden_size",
        "num_ranks",
        "seed",
        "rollout.envs_per_worker",
        "learner.device",
    )
    assert [sum(line.startswith(f"{name} =") for line in found) for name in named] == [1] * len(named)
    assert len(found) == len(named)
    assert "7 problems" in str(ConfigError(found))


def test_a_broken_field_is_not_reported_a_second_time_by_a_check_on_its_default():
    assert len(problems("--model.hidden_size", "x", "--model.num_heads", "3", "--model.num_kv_heads", "3")) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("model: {dino: {dim: 4, dim: 8}}", "key 'dim' is given twice"),
        ("- 1", "holds list; write 'section:'"),
        ("env: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: [", "is not plain YAML"),
        ("a: &a [*a]", "is not plain YAML"),
        ("? [1]\n: 2", "is not plain YAML"),
    ],
)
def test_a_malformed_preset_is_refused(tmp_path, text, expected):
    found = problems(preset=write(tmp_path, text))
    assert len(found) == 1
    assert expected in found[0]


def test_an_empty_preset_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "# nothing differs\n"), []) == ExperimentConfig()


def test_a_missing_preset_names_the_ones_beside_it(tmp_path):
    write(tmp_path, "")
    assert f"did you mean '{tmp_path}/preset.yaml'?" in problems(preset=str(tmp_path / "preste.yaml"))[0]


def test_a_policy_folder_without_config_is_refused(tmp_path):
    assert "has no config.json" in problems("--policy", str(tmp_path))[0]
    (tmp_path / "config.json").write_text("{}")
    assert load_config(None, ["--policy", str(tmp_path)]).policy == str(tmp_path)


@pytest.mark.parametrize("run_dir", [None, "runs/x"])
def test_a_relative_run_dir_is_refused_inside_a_ray_job(run_dir):
    cfg = dataclasses.replace(ExperimentConfig(), run_dir=run_dir)
    assert check_config(cfg, environ={}) == []
    (found,) = check_config(cfg, environ={"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"})
    assert "absolute path" in found.message


def test_an_absolute_run_dir_is_accepted_inside_a_ray_job():
    cfg = dataclasses.replace(ExperimentConfig(), run_dir="/data/run")
    assert check_config(cfg, environ={"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_wandb_is_refused_where_it_is_not_installed():
    assert "pip install 'vlarl_ray[wandb]'" in problems("--metrics.wandb_project", "p")[0]


def test_object_store_of_another_cluster_is_not_ours_to_check():
    load_config(None, ["--cluster.object_store_bytes", "1", "--cluster.address", "10.0.0.1:6379"])


def test_run_dir_that_holds_another_run_is_refused(tmp_path):
    run_dir = str(tmp_path)
    cfg = load_config(None, ["--run-dir", run_dir], purpose="train")
    (tmp_path / "config.json").write_text(config_to_json(cfg))
    args = ["--run-dir", run_dir]
    assert "add --resume" in problems(*args, purpose="train")[0]
    assert load_config(None, args, purpose="resume") == cfg
    assert load_config(None, [*args, "--num_iterations", "80"], purpose="resume").num_iterations == 80
    for purpose in ("train", "resume"):
        (found,) = problems(*args, "--seed", "1", "--model.dino.dim", "32", purpose=purpose)
        assert "another configuration (seed, model.dino.dim differ)" in found


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[]", b""])
def test_run_dir_with_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert "its config.json is damaged" in problems("--run-dir", str(tmp_path), purpose="resume")[0]


def test_resolved_config_comes_back_from_json():
    cfg = load_config(None, ["--env.tasks", "[mt10]", "--env.options", "{a: [1, null]}", "--algorithm.dual_clip", "3"])
    text = config_to_json(cfg)
    assert config_from_json(text) == cfg
    assert json.loads(text)["sft"]["batch_size"] == 64, "defaults are stored too"


def test_config_json_of_another_version_is_refused_with_the_field():
    tree = json.loads(config_to_json(ExperimentConfig()))
    tree["env"]["gone"] = 1
    with pytest.raises(ConfigError, match=r"env\.gone = 1: there is no such field"):
        config_from_json(json.dumps(tree))
    with pytest.raises(ConfigError, match="not JSON"):
        config_from_json("{")


@pytest.mark.parametrize("tree", ["[]", "3", "null"])
def test_config_json_of_another_shape_is_refused(tree):
    with pytest.raises(ConfigError):
        config_from_json(tree)


def test_run_dir_defaults_to_name_and_seed():
    assert run_dir_of(load_config(None, ["--name", "a", "--seed", "4"])) == "runs/a-seed4"
    assert run_dir_of(load_config(None, ["--run_dir", "/x"])) == "/x"


def test_every_field_is_documented_and_its_default_passes_as_an_override():
    docs = field_docs()
    assert len(docs) > 100
    text = format_fields()
    for path, doc in docs.items():
        assert len(doc.sentence) > 5
        assert f"--{path} " in text
        value = yaml.safe_dump(json.loads(json.dumps(doc.default)), default_flow_style=True).removesuffix("...\n")
        assert load_config(None, [f"--{path}={value.strip()}"]) == ExperimentConfig(), path
    assert all(sentence.endswith(".") for sentence in section_sentences().values())


def test_task_table_is_that_of_the_simulator():
    metaworld = pytest.importorskip("metaworld")
    assert set(metaworld.ALL_V3_ENVIRONMENTS) == set(MT50)
    assert tuple(metaworld.env_dict.MT10_V3) == MT10
    assert len(MT50) == len(set(MT50)) == 50
    assert expand_tasks(["mt10", "assembly-v3"]) == (*MT10, "assembly-v3")
    assert "corner2" in CAMERAS


def test_a_bad_config_is_refused_without_importing_torch_or_ray():
    code = (
        "import sys\n"
        "from vlarl_ray.config_loader import ConfigError, load_config\n"
        "try:\n    load_config(None, ['--seed', 'x'])\n"
        "except ConfigError:\n    pass\n"
        "load_config(None, [], purpose='train')\n"
        "print([m for m in ('torch', 'ray', 'metaworld', 'mujoco', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
