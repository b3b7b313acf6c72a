"""CPU-ms of the default policy per row, one thread: a server's forward (batch 12), a rank's two passes (batch 128).

Beside each: what its matrix-product FLOPs would take at the rate of a large square product on the same machine (the
limit), and the parts of a forward by operator. Figures are the lower of medians over rounds, as other work only adds.

Usage: python -m benchmarks.model_speed [--rounds 7] [--no-save]
"""

import argparse
import os
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._results import write_result
from vlarl_ray.config import LoraConfig, ModelConfig
from vlarl_ray.models import PolicyInputs, action_logprobs, new_policy
from vlarl_ray.models.lora import attach_lora

INSTRUCTIONS = ("close the drawer", "open the window", "press the button from above")


def inputs_of(model, batch):
    config = model.model_config
    shape = (batch, 1, config.image_size, config.image_size, 3)
    ids, lengths = model.encode_prompts([INSTRUCTIONS[row % 3] for row in range(batch)])
    return PolicyInputs(torch.randint(0, 256, shape, dtype=torch.uint8), ids, lengths, torch.zeros(batch, 4))


def cpu_seconds(function, repeats):
    start = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - start) / repeats


def best(function, rounds, repeats):
    function()
    return min(statistics.median(cpu_seconds(function, repeats) for _ in range(3)) for _ in range(rounds))


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def operators(function, batch):
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(10):
            function()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:12]}


def training_pass(model, inputs, tokens):
    output = model(inputs, tokens)
    logprobs = action_logprobs(output.actions.logits, tokens - model.first_action_token, temperature=1.0)
    (logprobs.mean() + output.values.square().mean()).backward()
    model.zero_grad(set_to_none=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    square = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / best(lambda: square @ square, args.rounds, 5)
    model = new_policy(ModelConfig(), INSTRUCTIONS, 0)
    server, rank = inputs_of(model, 12), inputs_of(model, 128)
    tokens = model.sample(rank, temperature=0.0, noise=None)[0]

    def act():
        return model.sample(server, temperature=0.0, noise=None)

    def learn():
        return training_pass(model, rank, tokens)

    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gemm_gflop_per_s": round(rate / 1e9, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        "forward_operators": operators(act, 12),
    }
    cases = [("forward, batch 12", act, 12, 10), ("forward + backward, everything, batch 128", learn, 128, 1)]
    for name, function, batch, repeats in cases:
        figures[name] = measure(function, batch, repeats, args.rounds, rate)
    attach_lora(model, LoraConfig(), seed=0)
    figures["forward + backward, LoRA, batch 128"] = measure(learn, 128, 1, args.rounds, rate)
    for name, figure in figures.items():
        print(f"{name:44} {figure}")
    if not args.no_save:
        print(write_result("model_speed", figures))


def measure(function, batch, repeats, rounds, rate):
    seconds, work = best(function, rounds, repeats), flops(function)
    return {
        "cpu_ms_per_row": round(1e3 * seconds / batch, 3),
        "mflop_per_row": round(work / batch / 1e6, 1),
        "limit_ms_per_row": round(1e3 * work / rate / batch, 3),
    }


if __name__ == "__main__":
    main()
