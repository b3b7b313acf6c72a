"""Our advantages and policy losses against reference files, `gae.json` and `rloo.json`; either may be missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlarl_ray.algorithms.advantages import chunk_rewards, gae, leave_one_out_advantages
from vlarl_ray.algorithms.losses import clipped_surrogate
from vlarl_ray.comparison import Group, NotComparableError, NotCovered, Ours, Row, compare, read_json

_Found = Iterator[tuple[str, Ours | NotCovered]]
_TOLERANCE = 1e-6
_FP32_TOLERANCE = 2e-6
"""Of numbers that the reference computed in fp32."""
_MODES: Mapping[str, Any] = {"sum": "per_chunk", "per_chunk": "per_chunk", "smdp": "smdp"}
_NOT_OUR_METRIC = (
    "counts masked and invalid tokens, and only ratios where clipping is the worse branch; ours does neither"
)


def rows(folder: Path) -> list[Row]:
    """Compare every case of the files there are.

    Raises:
        ValueError: If a file is damaged or lacks a field.
    """
    references: dict[str, Any] = {}
    groups = []
    for index, case in _cases(folder / "gae.json"):
        for kind, arrays in case["outputs"].items():
            prefix = f"gae[{index}].{kind}."
            references |= {prefix + name: value for name, value in arrays.items()}
            groups.append(_group(prefix, partial(_gae, case, kind, prefix)))
    for index, case in _cases(folder / "rloo.json"):
        prefix = f"rloo[{index}]."
        references |= {prefix + n: v for n, v in case.items() if n.startswith("advantages")}
        groups.append(_group(prefix + "advantages", partial(_leave_one_out, case, prefix)))
        for kind, outputs in case.get("ript_ppo", {}).items():
            inner = f"{prefix}ript_ppo.{kind}."
            references |= {inner + name: value for name, value in outputs.items()}
            groups.append(_group(inner, partial(_surrogate, case, kind, inner)))
    return compare(references, groups)


def _cases(path: Path) -> Iterator[tuple[int, Any]]:
    return enumerate(read_json(path).get("cases", []))


def _group(prefix: str, compute: Any) -> Group:
    return Group(prefix.replace("[", r"\[").replace("]", r"\]").replace(".", r"\.") + ".*", compute)


def _gae(case: Mapping[str, Any], kind: str, prefix: str) -> _Found:
    """Cut the stream into episodes, as ours takes one at a time."""
    reward_mode, _, discount_mode = kind.removeprefix("reward_").partition("__discount_")
    if reward_mode not in _MODES or discount_mode not in _MODES:
        raise NotComparableError(f"mode {kind!r} is unknown")
    lengths, gamma = np.array(case["executed_lengths"]), float(case["gamma"])
    padded = np.zeros((len(lengths), case["chunk_length"]))
    padded[np.arange(case["chunk_length"]) < lengths[:, None]] = case["env_step_rewards"]
    rewards = chunk_rewards(padded, lengths, gamma, _MODES[reward_mode])
    yield prefix + "chunk_rewards", Ours(rewards, _TOLERANCE)
    settings: Any = {"gamma": gamma, "discount_mode": _MODES[discount_mode]}
    # what a next value of 1 adds, without any reward, is the discount
    discounts = [
        gae(np.zeros(1), np.array([0.0, 1.0]), terminated=False, gae_lambda=0.0, num_env_steps=one, **settings)[0][0]
        for one in lengths[:, None]
    ]
    yield prefix + "discounts", Ours(discounts, _TOLERANCE)
    values, next_values, pieces = case["values"], case["next_values"], list(_episodes(case))
    if any(next_values[piece][:-1] != values[piece][1:] for piece in pieces):
        raise NotComparableError("within an episode next_values must be the values that follow")
    found = [
        gae(
            rewards[piece],
            np.array([*values[piece], next_values[piece][-1]]),
            terminated=case["terminated"][piece][-1],
            gae_lambda=float(case["gae_lambda"]),
            num_env_steps=lengths[piece],
            **settings,
        )
        for piece in pieces
    ]
    advantages, targets = (np.concatenate(column) for column in zip(*found, strict=True))
    yield prefix + "advantages", Ours(advantages, _TOLERANCE)
    yield prefix + "value_targets", Ours(targets, _TOLERANCE)


def _episodes(case: Mapping[str, Any]) -> Iterator[slice]:
    start, count = 0, len(case["values"])
    for k in range(count):
        if case["terminated"][k] or case["truncated"][k] or k == count - 1:
            yield slice(start, k + 1)
            start = k + 1


def _leave_one_out(case: Mapping[str, Any], prefix: str) -> _Found:
    returns = np.array(case["returns"], np.float64)
    groups = returns.reshape(-1, case["group_size"])
    advantages = np.concatenate([leave_one_out_advantages(group) for group in groups])
    yield prefix + "advantages", Ours(advantages, _TOLERANCE)
    yield prefix + "advantages_recovered_from_ript", Ours(advantages, _FP32_TOLERANCE)
    whole = leave_one_out_advantages(returns)
    yield prefix + "advantages_leave_one_out_over_whole_batch", Ours(whole, _TOLERANCE)


def _surrogate(case: Mapping[str, Any], kind: str, prefix: str) -> _Found:
    """Compute RIPT-VLA's loss as a masked sum: its two ways of averaging are weights and a denominator of ours."""
    advantages = torch.tensor(case["advantages"], dtype=torch.float64)
    old, new = (torch.tensor(case[name], dtype=torch.float64) for name in ("old_logprobs", "new_logprobs"))
    tokens, valid = torch.tensor(case["token_mask"]), torch.tensor(case["valid"])[:, None]
    kept = (tokens & valid).double()
    if kind == "token_mean":
        weights, normalizer = kept, float(kept.sum()) + 1e-6
    elif kind == "sequence_mean":
        weights, normalizer = kept / tokens.sum(1, keepdim=True).clamp(min=1), float(len(old))
    else:
        raise NotComparableError(f"averaging {kind!r} is unknown")
    new.requires_grad_()
    loss = clipped_surrogate(
        new - old,
        advantages,
        weights,
        clip_low=case["clip_ratio_low"],
        clip_high=case["clip_ratio_high"],
        normalizer=normalizer,
    )
    loss.backward()
    yield prefix + "pg_loss", Ours(loss.item(), _FP32_TOLERANCE)
    yield prefix + "grad_wrt_new_logprobs", Ours(new.grad, _FP32_TOLERANCE)
    yield prefix + "clip_fraction_unmasked", NotCovered(_NOT_OUR_METRIC)
