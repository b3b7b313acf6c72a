import hashlib

import numpy as np
import pytest
import torch

from tests.learner_runs import LENGTHS, build, fixed_batch, run_ranks, three_updates
from tests.tiny_model import algorithm_config, learner_config, make_trajectories, tiny_model
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.config import LoraConfig
from vlarl_ray.learner.batch import deal_trajectories
from vlarl_ray.learner.fsdp import Ranks
from vlarl_ray.learner.group import LearnerGroup
from vlarl_ray.learner.learner import Learner
from vlarl_ray.learner.optimizer import ShardOptimizer
from vlarl_ray.learner.update import NonFiniteError
from vlarl_ray.models.lora import lora_layers
from vlarl_ray.transport import LocalTransport
from vlarl_ray.types import ActRequest
from vlarl_ray.weights.canary import update_digests

JOBS = {
    "lora": ("three_updates", {}),
    "full": ("three_updates", {"learner": {"train": "full"}}),
    "separate critic": ("three_updates", {"learner": {"critic": "separate"}}),
    "warm-up": ("three_updates", {"algorithm": {"critic_warmup_updates": 2}}),
    "KL stop": ("three_updates", {"algorithm": {"target_kl": 1e-6}, "learner": {"actor_learning_rate": 0.01}}),
    "rank without rows": ("three_updates", {"algorithm": {"num_minibatches": 13}}),  # minibatches of 2 and 1
    "KL penalty": ("three_updates", {"algorithm": {"kl_coef": 0.1, "entropy_coef": 0.01}}),
    "LoRA dropout": ("three_updates", {"learner": {"lora": LoraConfig(rank=3, alpha=6.0, dropout=0.3)}}),
    "OpenVLA": ("three_updates", {"openvla": {}}),
    "OpenVLA autoregressive, separate critic": (
        "three_updates",
        {"openvla": {"decoding": "autoregressive"}, "learner": {"critic": "separate"}, "num_updates": 1},
    ),
    "poisoned": ("poisoned_update", {}),
}
LIMITS = {"full": 1e-5}


@pytest.fixture(scope="module")
def two_ranks():
    results = run_ranks(2, list(JOBS.values()))
    return [dict(zip(JOBS, rank, strict=True)) for rank in results]


@pytest.fixture(scope="module")
def one_rank():
    return {name: three_updates(**options) for name, (kind, options) in JOBS.items() if kind == "three_updates"}


def parameters(learner):
    return learner.state_dict()[0]["parameters"]


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(np.abs(first[name] - second[name]).max() for name in first)


def digest(arrays):
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def split(learner):
    arrays = parameters(learner)
    critic = {name: value for name, value in arrays.items() if name.startswith("value_head.")}
    return digest({name: value for name, value in arrays.items() if name not in critic}), digest(critic)


@pytest.mark.parametrize("case", [name for name in JOBS if name != "poisoned"])
def test_f59_two_ranks_with_uneven_rows_compute_the_update_of_one(case, one_rank, two_ranks):
    """F59, and F19: advantages are normalised over the whole batch whatever the number of ranks."""
    one, two = one_rank[case], two_ranks[0][case]
    for part in ("parameters", "optimizer"):
        assert largest_difference(one["state"][0][part], two["state"][0][part]) < LIMITS.get(case, 1e-6)
    assert two["state"][1] == one["state"][1]
    for ours, theirs in zip(one["metrics"], two["metrics"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_f59_all_ranks_report_the_same_metrics_and_only_the_first_gives_weights(two_ranks):
    for case, first in two_ranks[0].items():
        if case != "poisoned":
            assert first["metrics"] == two_ranks[1][case]["metrics"]
            assert two_ranks[1][case]["update"] is None
            assert two_ranks[1][case]["state"] == ({}, {})


def test_one_sharded_rank_computes_the_bits_of_an_unsharded_one_and_bfloat16_is_close():
    bf16 = {"learner": {"dtype": "bfloat16"}}
    [[sharded, half]] = run_ranks(1, [("three_updates", {}), ("three_updates", bf16)])
    plain = three_updates()
    assert digest(sharded["state"][0]["parameters"]) == digest(plain["state"][0]["parameters"])
    for name in ("learn/policy_loss", "learn/value_loss", "learn/grad_norm_actor"):
        assert half["metrics"][0][name] == pytest.approx(plain["metrics"][0][name], rel=0.05, abs=0.01), name
    assert half["state"][0]["parameters"].keys() == plain["state"][0]["parameters"].keys()
    assert all(value.dtype == np.float32 for value in half["state"][0]["parameters"].values())


def test_bfloat16_without_sharding_is_refused():
    with pytest.raises(ValueError, match=r"learner\.dtype = 'bfloat16' needs a process group"):
        build(learner={"dtype": "bfloat16"})


def test_a_group_merges_the_scores_of_its_ranks_in_trajectory_order(two_ranks):
    trajectories = make_trajectories(LENGTHS)
    whole = three_updates(num_updates=1)["scores"]

    class Recorded:
        def __init__(self, scores):
            self.scores = scores

        def score(self, _):
            return self.scores

    ranks = [Recorded(rank["lora"]["scores"]) for rank in two_ranks]
    merged = LearnerGroup(ranks, LocalTransport(), deadline_s=1.0).score(trajectories)
    assert [len(s) for s in deal_trajectories([n + 1 for n in LENGTHS], 2)] == [len(rank.scores) for rank in ranks]
    for trajectory, ours, theirs in zip(trajectories, merged, whole, strict=True):
        assert len(ours.values) == trajectory.num_decisions + 1
        np.testing.assert_allclose(ours.values, theirs.values, atol=1e-6)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-6)


def test_every_rank_measures_its_share_of_memory(one_rank, two_ranks):
    alone, first, second = (results["OpenVLA"]["memory"] for results in (one_rank, *two_ranks))
    for rank in (first, second):
        assert (alone.pass_rows, rank.pass_rows) == (5, 5)
        # Tensors of an odd number of rows are shared out unevenly.
        assert rank.weights == pytest.approx(alone.weights / 2, rel=0.1)
        assert rank.optimizer == pytest.approx(alone.optimizer / 2, rel=0.2)
    assert first.weights + second.weights == alone.weights
    assert first.optimizer + second.optimizer == alone.optimizer
    assert first.total == first.weights + first.optimizer + first.passes


def test_f12_real_policy_starts_at_ratio_one_and_leaves_it(one_rank):
    metrics = one_rank["OpenVLA"]["metrics"]
    assert metrics[0]["learn/first_ratio_error"] < 1e-4
    assert metrics[0]["learn/ratio_error"] > 1e-4
    assert metrics[0]["learn/grad_norm_actor"] > 0
    assert metrics[0]["learn/grad_norm_critic"] > 0


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_scores_are_the_log_probabilities_the_sampler_recorded(temperature):
    trajectories = make_trajectories(LENGTHS, temperature=temperature)
    scores = build().score(trajectories)
    for trajectory, score in zip(trajectories, scores, strict=True):
        np.testing.assert_allclose(score.logprobs, trajectory.behaviour_logprobs, atol=1e-5)


def test_f12_old_logprobs_stay_frozen_while_the_policy_moves():
    """Regression for defect 1: old log-probabilities taken from each first forward make every ratio 1 forever."""
    learner = build(learner={"actor_learning_rate": 0.01})
    metrics = learner.update(fixed_batch(PPO(algorithm_config()), version=0))
    assert metrics["learn/first_ratio_error"] < 1e-4
    assert metrics["learn/ratio_error"] > 1e-3
    assert metrics["learn/approx_kl"] > 0


def test_f15_micro_batches_accumulate_to_one_step_per_minibatch():
    """Regression for defect 5: a step per micro-batch."""
    whole, cut = (three_updates(learner={"micro_batch_size": size}) for size in (20, 3))
    assert largest_difference(whole["state"][0]["parameters"], cut["state"][0]["parameters"]) < 1e-6
    for run in (whole, cut):
        assert run["metrics"][0]["learn/num_optimizer_steps"] == 4  # 2 epochs x 2 minibatches
        assert run["state"][1] == {"optimizer_steps": [12, 12]}


def test_f16_after_a_kl_stop_nothing_changes_in_the_remaining_minibatches():
    """Regression for defect 6: gradients were zeroed and the optimiser stepped all the same."""
    options = {"learner": {"actor_learning_rate": 0.01}, "num_updates": 1}
    runs = [three_updates(algorithm={"target_kl": 1e-6, "num_epochs": n}, **options) for n in (1, 3)]
    for run in runs:
        assert run["metrics"][0]["learn/num_optimizer_steps"] == 1
        assert run["metrics"][0]["learn/stopped_by_kl"] == 1
        assert run["state"][1] == {"optimizer_steps": [1, 1]}
    assert digest(runs[0]["state"][0]["parameters"]) == digest(runs[1]["state"][0]["parameters"])
    assert digest(runs[0]["state"][0]["parameters"]) != digest(parameters(build()))
    unlimited = three_updates(algorithm={"num_epochs": 1}, **options)
    assert unlimited["metrics"][0]["learn/stopped_by_kl"] == 0
    assert digest(unlimited["state"][0]["parameters"]) != digest(runs[0]["state"][0]["parameters"])


@pytest.mark.parametrize("train", ["lora", "full"])
def test_f32_warm_up_moves_only_the_critic_for_exactly_n_updates(train):
    ppo = PPO(algorithm_config(critic_warmup_updates=2))
    learner = build(learner={"train": train}, algorithm={"critic_warmup_updates": 2})
    hashes = [split(learner)]
    for version in range(3):
        metrics = learner.update(fixed_batch(ppo, version=version))
        assert metrics["learn/critic_warmup"] == float(version < 2)
        assert (metrics["learn/grad_norm_actor"] == 0) == (version < 2), (
            "gradients kept would pile up until the first step"
        )
        hashes.append(split(learner))
    actor, critic = zip(*hashes, strict=True)
    assert actor[0] == actor[1] == actor[2] != actor[3]
    assert len(set(critic)) == 4


def test_f33_detached_value_leaves_the_backbone_alone():
    def actor_gradient(**learner):
        built = build(learner={"train": "lora", **learner})
        batch = fixed_batch(PPO(algorithm_config()), version=0)
        batch.advantages[:] = 0  # only the value loss is left
        metrics = built.update(batch)
        assert metrics["learn/grad_norm_critic"] > 0
        return metrics["learn/grad_norm_actor"]

    assert actor_gradient(detach_value=True) == 0
    assert actor_gradient(detach_value=False) > 0
    assert actor_gradient(critic="separate") == 0  # the critic has adapters of its own


def test_f34_explained_variance_is_that_of_the_values_the_targets_were_made_with():
    batch = fixed_batch(PPO(algorithm_config()), version=0)
    batch.old_values[:] = batch.returns
    assert build().update(batch)["learn/explained_variance"] == 1.0


def test_f14_the_reference_policy_is_the_one_with_adapters_disabled(one_rank):
    metrics = one_rank["KL penalty"]["metrics"]
    assert 0 < metrics[0]["learn/kl_to_reference"] < metrics[2]["learn/kl_to_reference"]


def test_f14_a_kl_penalty_without_adapters_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.kl_coef needs a reference policy"):
        build(learner={"train": "full"}, algorithm={"kl_coef": 0.1})


def test_a_loss_that_overflows_raises_on_every_rank_and_steps_nothing(two_ranks):
    for rank in two_ranks:
        assert rank["poisoned"].startswith("update from version 0: value_loss not finite; nothing was stepped.")


def test_a_gradient_that_overflows_names_tensors_and_steps_nothing():
    class SteepPPO(PPO):
        def loss(self, rows, normalizers):
            terms = super().loss(rows, normalizers)
            steep = (rows.values * 0).sqrt().sum()  # the value is 0, its slope infinite times 0
            return type(terms)(terms.policy, terms.value + steep, terms.sums, terms.maxima)

    cfg = learner_config()
    ppo = SteepPPO(algorithm_config())
    learner = Learner(cfg, ppo, tiny_model(cfg))
    before = digest(parameters(learner))
    with pytest.raises(NonFiniteError, match=r"update from version 7: gradient of project\.lora_A"):
        learner.update(fixed_batch(ppo, version=7))
    assert digest(parameters(learner)) == before


def test_a_batch_number_that_is_not_finite_names_task_and_decision():
    batch = fixed_batch(PPO(algorithm_config()), version=4)
    batch.old_logprobs[5, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"version 4: old_logprobs of row 5 \(task 'push it', decision 2\)"):
        build().update(batch)


def test_weight_update_holds_the_adapters_by_official_name_and_the_heads(one_rank, two_ranks):
    for run in (one_rank["lora"], two_ranks[0]["lora"]):
        update, arrays = run["update"], run["state"][0]["parameters"]
        model = tiny_model(learner_config())
        assert set(update.adapters) == set(lora_layers(model))
        assert update.lora_scale == 2.0
        a, b = update.adapters["layers.0.weight"]
        np.testing.assert_array_equal(a, arrays["layers.0.lora_A.default.weight"])
        np.testing.assert_array_equal(b, arrays["layers.0.lora_B.default.weight"])
        assert b.any(), "B starts at zero and must have moved"
        assert set(update.tensors) == {name for name in arrays if name.startswith("value_head.")}
    full = one_rank["full"]["update"]
    assert not full.adapters
    assert set(full.tensors) == {name for name, _ in tiny_model(learner_config(train="full")).named_parameters()}


def test_group_gives_a_reference_to_the_weights_with_bytes_and_digests():
    group = LearnerGroup([build()], LocalTransport(), deadline_s=1.0)
    reference, num_bytes, digests = group.weight_update(5)
    assert reference.version == 5
    assert num_bytes == reference.num_bytes
    assert digests == update_digests(reference)


def test_gathered_weights_are_copies_that_later_updates_leave_alone():
    learner = build()
    update = learner.weight_update(0)
    before = update_digests(update)
    learner.update(fixed_batch(PPO(algorithm_config()), version=0))
    assert update_digests(update) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_f61_saved_by_any_number_of_ranks_and_resumed_by_one_equals_never_stopped(ranks, two_ranks):
    straight = three_updates(num_updates=5)["state"]
    saved = two_ranks[0]["lora"]["state"] if ranks == 2 else three_updates()["state"]
    resumed = three_updates(num_updates=2, first_version=3, resume=saved)["state"]
    difference = largest_difference(straight[0]["parameters"], resumed[0]["parameters"])
    assert difference == 0 if ranks == 1 else difference < 1e-6
    assert resumed[1] == straight[1]


def test_state_of_another_model_is_refused():
    state = build().state_dict()
    with pytest.raises(ValueError, match="learner state belongs to another model"):
        build(learner={"train": "full"}).load_state_dict(*state)


def test_adapters_and_config_must_agree():
    cfg = learner_config()
    with pytest.raises(ValueError, match=r"learner\.train = 'lora', but the model has 0 adapted layers"):
        Learner(cfg, PPO(algorithm_config()), tiny_model(learner_config(train="full")))


def test_a_separate_critic_without_adapters_is_refused():
    with pytest.raises(ValueError, match=r"learner\.critic = 'separate' needs learner\.train = 'lora'"):
        build(learner={"train": "full", "critic": "separate"})


def test_an_update_fetches_every_trajectory_once():
    fetched = []

    def fetch(references):
        fetched.append(len(references))
        return list(references)

    learner = build()
    learner.update(fixed_batch(PPO(algorithm_config()), version=0), fetch)
    learner.score(make_trajectories(LENGTHS), fetch)
    assert fetched == [len(LENGTHS), len(LENGTHS)]


def test_probe_log_probabilities_are_those_of_the_current_weights():
    [trajectory] = make_trajectories([12])
    request = ActRequest(
        images=trajectory.frames[:-1],
        proprio=trajectory.proprio[:-1],
        instructions=("reach",) * 12,
        noise_keys=np.zeros((12, 2), np.uint64),
        temperature=1.0,
        policy_version=0,
    )
    learner = build(learner={"actor_learning_rate": 0.01})
    before = learner.logprobs(request, trajectory.tokens)
    np.testing.assert_allclose(before, trajectory.behaviour_logprobs, atol=1e-5)
    learner.update(fixed_batch(PPO(algorithm_config()), version=0))
    assert np.abs(learner.logprobs(request, trajectory.tokens) - before).max() > 1e-3


def test_an_update_improves_what_it_optimises():
    """Actions with positive advantage become likelier, the others rarer, and values approach their targets."""
    learner = build(learner={"actor_learning_rate": 0.01, "critic_learning_rate": 0.01}, algorithm={"num_epochs": 10})
    batch = fixed_batch(PPO(algorithm_config()), version=0)
    trajectories = make_trajectories(LENGTHS, seed=0)
    before, _, after = learner.score(trajectories), learner.update(batch), learner.score(trajectories)
    gain = np.concatenate([(a.logprobs - b.logprobs).sum(1) for a, b in zip(after, before, strict=True)])
    assert np.corrcoef(gain, batch.advantages)[0, 1] > 0.5
    errors = [
        np.square(np.concatenate([s.values[:-1] for s in scores]) - batch.returns).mean() for scores in (before, after)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("max_grad_norm", "scale"), [(1.0, 0.1), (100.0, 1.0)])
def test_gradients_are_clipped_to_the_norm_over_all_ranks(max_grad_norm, scale):
    parameter = torch.nn.Parameter(torch.zeros(2, 1))
    cfg = learner_config(max_grad_norm=max_grad_norm)
    ranks = Ranks(rank=0, world_size=1, has_process_group=False)
    optimizer = ShardOptimizer({"w": parameter}, learning_rate=1.0, cfg=cfg, ranks=ranks)
    parameter.grad = torch.tensor([[3.0], [4.0]])
    assert optimizer.squared_grad_norm().item() == pytest.approx(25.0)
    optimizer.step(10.0)  # another rank holds the rest of the norm
    moments = optimizer.moment_shards()["w/exp_avg"]
    np.testing.assert_allclose(moments, [[0.3 * scale], [0.4 * scale]], rtol=1e-5)
    assert parameter.grad is None


def test_threads_are_those_of_the_config():
    build(learner={"num_threads": 1})
    assert torch.get_num_threads() == 1
