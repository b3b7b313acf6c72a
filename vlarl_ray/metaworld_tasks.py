"""Meta-World's task names as a plain table, so that a config is checked without importing the simulator."""

from __future__ import annotations

from collections.abc import Sequence

MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)

MT50 = (
    "assembly-v3",
    "basketball-v3",
    "bin-picking-v3",
    "box-close-v3",
    "button-press-topdown-v3",
    "button-press-topdown-wall-v3",
    "button-press-v3",
    "button-press-wall-v3",
    "coffee-button-v3",
    "coffee-pull-v3",
    "coffee-push-v3",
    "dial-turn-v3",
    "disassemble-v3",
    "door-close-v3",
    "door-lock-v3",
    "door-open-v3",
    "door-unlock-v3",
    "hand-insert-v3",
    "drawer-close-v3",
    "drawer-open-v3",
    "faucet-open-v3",
    "faucet-close-v3",
    "hammer-v3",
    "handle-press-side-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "lever-pull-v3",
    "pick-place-wall-v3",
    "pick-out-of-hole-v3",
    "pick-place-v3",
    "plate-slide-v3",
    "plate-slide-side-v3",
    "plate-slide-back-v3",
    "plate-slide-back-side-v3",
    "peg-insert-side-v3",
    "peg-unplug-side-v3",
    "soccer-v3",
    "stick-push-v3",
    "stick-pull-v3",
    "push-v3",
    "push-wall-v3",
    "push-back-v3",
    "reach-v3",
    "reach-wall-v3",
    "shelf-place-v3",
    "sweep-into-v3",
    "sweep-v3",
    "window-open-v3",
    "window-close-v3",
)

CAMERAS = ("behindGripper", "corner", "corner2", "corner3", "corner4", "gripperPOV", "topview")

ACTION_DIM = 4
"""End-effector motion xyz and gripper."""

NUM_INIT_STATES = 50
"""Goals of a task in one task set."""

MAX_ENV_STEPS = 500
"""The simulator refuses to step further."""


def expand_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Replace `mt10` and `mt50` by the names they stand for; other names stay as they are.

    Example:
        >>> len(expand_tasks(["mt10"])), expand_tasks(["reach-v3"])
        (10, ('reach-v3',))
    """
    sets = {"mt10": MT10, "mt50": MT50}
    return tuple(name for task in tasks for name in sets.get(task, (task,)))
