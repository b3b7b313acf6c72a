"""What a job is planned to take is what its tensors take."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from benchmarks._official_folder import OPENVLA_7B
from benchmarks.memory import compare
from tests.small_quest import official_size, quest_config
from vlarl_ray.config import InferenceConfig, VllmConfig
from vlarl_ray.config_loader import load_config
from vlarl_ray.live_bytes import LiveBytes
from vlarl_ray.memory_plan import plan_memory
from vlarl_ray.models.quest import QueST

GIB = 2**30


@pytest.mark.parametrize("preset", ["jobs/smoke.yaml", "jobs/toy.yaml"])
def test_every_part_is_within_15_percent_of_what_is_measured(preset):
    for name, figure in compare(load_config(preset, [])).items():
        assert figure["planned"] == pytest.approx(figure["measured"], rel=0.15), name


def test_autoregressive_decoding_keeps_keys_and_values():
    overrides = ["--model.decoding", "autoregressive", "--inference.batch_size", "3"]
    figures = compare(load_config("jobs/smoke.yaml", overrides))
    cached = figures["inference server: keys and values"]
    assert cached["planned"] > 0
    sampling = figures["inference server: sampling"]
    assert cached["planned"] + sampling["planned"] == pytest.approx(cached["measured"] + sampling["measured"], rel=0.15)


def test_vllm_reserves_its_pool_and_merges_one_tensor_at_a_time():
    cfg = load_config("jobs/smoke.yaml", ["--model.decoding", "autoregressive"])

    def parts(**settings):
        inference = InferenceConfig(engine="vllm", vllm=VllmConfig(**settings))
        plan = plan_memory(replace(cfg, inference=inference))
        return {part.name: part.num_bytes for part in plan.parts if part.process == "inference server"}

    assert parts()["keys and values"] == GIB
    assert parts(kv_cache_bytes=1 << 20)["keys and values"] == 1 << 20
    assert parts()["merging"] == 768 * 64 * 12  # the embedding, in fp32 throughout
    assert parts(max_num_seqs=8)["sampling"] < parts(max_num_seqs=64)["sampling"]


def test_vllm_makes_room_for_the_adapters_that_it_applies():
    overrides = ["--model.decoding", "autoregressive", "--learner.lora.target_modules", ".*down_proj"]
    cfg = load_config("jobs/smoke.yaml", overrides)
    inference = InferenceConfig(engine="vllm", vllm=VllmConfig(lora="native", max_num_seqs=4, max_model_len=100))
    parts = {part.name: part.num_bytes for part in plan_memory(replace(cfg, inference=inference)).parts}
    layers, hidden, inner, vocabulary, rank = cfg.model.num_layers, 64, 128, 768, 8  # the least above 4
    assert parts["adapters"] == (layers * (inner + hidden) + hidden + vocabulary) * rank * 4
    assert parts["applying adapters"] == 4 * 100 * inner * rank * 4
    assert "merging" not in parts


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_skill_policy_is_planned_for_with_its_cameras_and_frozen_modules(train):
    small = ["--inference.batch_size", "5", "--learner.micro_batch_size", "4"]
    cfg = load_config("jobs/toy.yaml", ["--algorithm.ratio_level", "token", *small])
    model = quest_config(action_dim=2, cameras=("front", "wrist"), lowdim=(("position", 2),))
    figures = compare(replace(cfg, model=model, learner=replace(cfg.learner, train=train)))
    for name, figure in figures.items():
        assert figure["planned"] == pytest.approx(figure["measured"], rel=0.15), name
    # 2 layers x 2 x 16 wide x (2 context + 4 codes) positions x 4 bytes, for each of 5 rows
    assert figures["inference server: keys and values"]["measured"] == 5 * 2 * 2 * 16 * 6 * 4


@pytest.mark.parametrize("train", ["full", "lora"])
def test_what_a_model_freezes_is_whole_on_every_rank_and_not_gathered(train):
    cfg = replace(load_config(None, ["--run_dir", "none"]), model=official_size())
    with torch.device("meta"):
        model = QueST(cfg.model)
    frozen = sum(p.nbytes for name, p in model.named_parameters() if name.startswith(model.frozen_modules))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    prior, head = (sum(p.nbytes for p in m.parameters()) for m in (model.policy_prior, model.value_head))
    cfg = replace(cfg, learner=replace(cfg.learner, num_ranks=8, train=train))
    parts = {part.name: part.num_bytes for part in plan_memory(cfg, proprio_dim=12).parts if "rank" in part.process}
    shared = 0 if train == "full" else prior / 8
    assert parts["frozen weights"] == pytest.approx(frozen + buffers + shared, rel=0.01)
    assert parts["gathered"] < prior + head
    if train == "full":
        assert parts["trained weights"] == pytest.approx((prior + head) / 8, rel=0.01)


@pytest.fixture(scope="module")
def seven_billion():
    cfg = load_config(None, ["--run_dir", "none"])
    return replace(
        cfg,
        model=OPENVLA_7B,
        env=replace(cfg.env, image_size=224),
        learner=replace(cfg.learner, num_ranks=8, micro_batch_size=2, dtype="bfloat16"),
        inference=replace(cfg.inference, batch_size=16, dtype="bfloat16"),
    )


def test_a_7b_policy_is_planned_for_without_its_weights(seven_billion):
    parts = {f"{part.process}: {part.name}": part.num_bytes for part in plan_memory(seven_billion).parts}
    assert parts["inference server: weights"] == pytest.approx(2 * 7.54e9, rel=0.01)
    # 32 layers x 2 x 32 heads x 128 x (64 prompt + 256 patches + 6 drawn) positions x 2 bytes, for each of 16 rows
    assert parts["inference server: keys and values"] == 16 * 32 * 2 * 32 * 128 * 326 * 2
    assert parts["learner rank: frozen weights"] == pytest.approx(2 * 7.54e9 / 8, rel=0.01)
    assert "14.0" in plan_memory(seven_billion).table


def test_more_ranks_take_less_each(seven_billion):
    two = replace(seven_billion, learner=replace(seven_billion.learner, num_ranks=2))
    assert plan_memory(two).total("learner rank") > plan_memory(seven_billion).total("learner rank") + GIB


def test_a_storage_counts_once_and_until_it_is_freed():
    with LiveBytes() as live:
        first = torch.zeros(256)
        views = [first[:128], first.view(16, 16)]
        assert live.now == 1024
        second = first + 1
        assert (live.now, live.peak) == (2048, 2048)
        del first
        assert live.now == 2048  # its views live on
        del views, second
        gc.collect()
        assert (live.now, live.peak) == (0, 2048)


def test_what_was_there_before_does_not_count():
    before = torch.zeros(256)
    with LiveBytes(known=[before]) as live:
        before.add_(1)
        assert live.peak == 0
