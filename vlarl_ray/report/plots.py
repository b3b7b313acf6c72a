"""The figures of the report, as inline SVG (matplotlib without a display, text drawn as paths)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlarl_ray.report.run_data import RunData

# Okabe-Ito: distinguishable with any colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#8A8F98"

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": "#4a4f57",
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
}
_MAX_TASK_PANELS = 12
_WIDTH_INCHES = 10.0

SECTIONS = {"rollout": BLUE, "score": SKY, "learn": ORANGE, "publish": GREEN, "other": GREY}
PARTS = {"render": BLUE, "physics": SKY, "inference": ORANGE, "reset": GREY}
_DIAGNOSTICS = (
    ("learn/approx_kl", "Approximate KL (nats)", False),
    ("learn/clip_fraction", "Clip fraction", False),
    ("learn/entropy", "Entropy (nats)", False),
    ("learn/explained_variance", "Explained variance", False),
    ("learn/sampler_ratio_max_error", "Sampler ratio: largest |ratio - 1|", True),
    ("canary/max_abs_logprob_diff", "Canary: largest log-prob. difference", True),
)


def learning_curves(run: RunData) -> str:
    """Success and steps to success over updates and over env steps, rollouts and held-out evaluations."""
    env_steps = run.env_steps_before()

    def over_env_steps(iteration: int) -> float:
        return env_steps.get(iteration, max(env_steps.values())) / 1e3

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        for column, (label, position) in enumerate(
            (("updates", float), ("training env steps (thousands)", over_env_steps))
        ):
            _success(axes[0, column], run, position)
            _steps_to_success(axes[1, column], run, position)
            axes[1, column].set_xlabel(label)
        axes[0, 0].set_title("Success rate")
        axes[1, 0].set_title("Steps to success (env steps, over successes)")
        axes[0, 0].legend(loc="lower right")
        axes[1, 0].legend(loc="lower left")

    return _svg(draw, 5.6, "Success and steps to success over updates and env steps")


def task_curves(run: RunData) -> str | None:
    """Success of each task over updates; None with too many tasks, or before the first row."""
    prefix = "rollout/success_rate/"
    logged = {key.removeprefix(prefix): None for row in run.rows for key in row if key.startswith(prefix)}
    evaluated = {row["task_id"]: None for evaluation in run.evaluations for row in evaluation.get("per_task", ())}
    tasks = list(evaluated | logged)
    if not 1 <= len(tasks) <= _MAX_TASK_PANELS:
        return None
    columns = min(3, len(tasks))
    lines = math.ceil(len(tasks) / columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for ax, task in zip(axes, tasks, strict=False):
            ax.plot(*run.series(prefix + task), color=BLUE, linewidth=1, alpha=0.8, label="rollouts")
            _intervals(ax, [(e["iteration"], row) for e in run.evaluations for row in _task_rows(e, task)])
            ax.set_title(task, parse_math=False)
            ax.set_ylim(-0.03, 1.03)
            _integer_axis(ax)
        for ax in axes[len(tasks) :]:
            ax.set_visible(False)
        axes[0].legend(loc="lower right")
        figure.supxlabel("updates", fontsize=9, color="#4a4f57")

    return _svg(draw, 2.6 * lines + 0.3, "Success of each task over updates")


def time_split(run: RunData) -> str:
    """Wall time of each update by section, and CPU time of a decision by part."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        seconds = {name: [row.get(f"time/{name}_s") or 0.0 for row in run.rows] for name in SECTIONS if name != "other"}
        known = [sum(values) for values in zip(*seconds.values(), strict=True)]
        whole = [row.get("time/update_s") for row in run.rows]
        seconds["other"] = [
            max(0.0, total - part) if total is not None else 0.0 for total, part in zip(whole, known, strict=True)
        ]
        _stacked(left, run, seconds, SECTIONS)
        left.set_title("Wall time of an update (s)")
        parts = {name: [row.get(f"time/{name}_cpu_ms_per_decision") or 0.0 for row in run.rows] for name in PARTS}
        _stacked(right, run, parts, PARTS)
        right.set_title("CPU time of a decision (ms)")

    return _svg(draw, 3.3, "Time of an update by section and CPU time of a decision by part")


def diagnostics(run: RunData) -> str:
    """Learning diagnostics and the two trust figures over updates."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 3, sharex=True).ravel()
        for ax, (name, title, is_error) in zip(axes, _DIAGNOSTICS, strict=True):
            iterations, values = run.series(name)
            ax.plot([i + 1 for i in iterations], values, color=BLUE, linewidth=1.4, marker=".", markersize=4)
            ax.set_title(title)
            _integer_axis(ax)
            if is_error:
                _error_axis(ax, values)
            elif values and min(values) >= 0:
                ax.set_ylim(0, 1.08 * max(values) or 1.0)
            if not values:
                ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center", color=GREY)
        for ax in axes[3:]:
            ax.set_xlabel("updates")

    return _svg(draw, 4.6, "Learning diagnostics over updates")


def _success(ax: Axes, run: RunData, position: Callable[[int], float]) -> None:
    iterations, values = run.series("rollout/success_rate")
    ax.plot([position(i) for i in iterations], values, color=BLUE, linewidth=1.4, label="rollouts (sampled)")
    _intervals(ax, [(position(e["iteration"]), e) for e in run.evaluations])
    ax.set_ylim(-0.03, 1.03)
    _integer_axis(ax)


def _steps_to_success(ax: Axes, run: RunData, position: Callable[[int], float]) -> None:
    iterations, values = run.series("rollout/steps_to_success")
    ax.plot([position(i) for i in iterations], values, color=BLUE, linewidth=1.4, label="rollouts (sampled)")
    evaluations = [e for e in run.evaluations if e["steps_to_success"] is not None]
    evaluated = [e["steps_to_success"] for e in evaluations]
    places = [position(e["iteration"]) for e in evaluations]
    ax.plot(places, evaluated, "o", color=ORANGE, markersize=5, label="held-out evaluation")
    expert = run.summary.expert_steps_to_success
    if expert is not None:
        ax.axhline(expert, color=GREEN, linestyle="--", linewidth=1.2, label=f"scripted expert ({expert:.0f})")
    tallest = max([*values, *evaluated, expert or 0.0])
    ax.set_ylim(0, 1.12 * tallest or 1.0)
    _integer_axis(ax)


def _intervals(ax: Axes, points: Sequence[tuple[float | int, Mapping[str, Any]]]) -> None:
    """Evaluations as dots with their confidence intervals."""
    if not points:
        return
    rates = [e["success_rate"] for _, e in points]
    # max(0, ...): at 0 % and 100 % the interval touches the rate, up to rounding.
    below = [max(0.0, e["success_rate"] - e["ci_low"]) for _, e in points]
    above = [max(0.0, e["ci_high"] - e["success_rate"]) for _, e in points]
    ax.errorbar(
        [x for x, _ in points], rates, yerr=[below, above], fmt="o", color=ORANGE,
        markersize=5, capsize=3, linewidth=1.2, label="held-out evaluation, 95 %",
    )  # fmt: skip


def _task_rows(evaluation: Mapping[str, Any], task: str) -> list[Mapping[str, Any]]:
    return [row for row in evaluation.get("per_task", ()) if row["task_id"] == task]


def _stacked(ax: Axes, run: RunData, layers: Mapping[str, Sequence[float | int]], colors: Mapping[str, str]) -> None:
    updates = [row["iteration"] + 1 for row in run.rows]
    base = [0.0] * len(updates)
    for name, values in layers.items():
        mean = sum(values) / len(values) if values else 0.0
        ax.bar(updates, values, bottom=base, width=0.9, color=colors[name], label=f"{name} ({mean:.3g})")
        base = [b + value for b, value in zip(base, values, strict=True)]
    ax.set_ylim(0, 1.38 * max(base, default=0.0) or 1.0)
    ax.legend(loc="upper left", ncols=3, title="mean in brackets", title_fontsize=8, fontsize=8, alignment="left")
    ax.grid(visible=False, axis="x")
    ax.set_xlabel("updates")
    _integer_axis(ax)


def _integer_axis(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _error_axis(ax: Axes, values: Sequence[float | int]) -> None:
    """Logarithmic, unless an error is exactly zero."""
    if values and min(values) > 0:
        ax.set_yscale("log")
        ax.set_ylim(min(values) / 10, max(values) * 10)
    else:
        ax.set_ylim(bottom=0)


def _svg(draw: Callable[[Figure], None], height_inches: float, title: str) -> str:
    """Draw a figure and return it as an `<svg>` element for a page that holds several."""
    # The salt keeps element ids apart between figures of one page, and equal between two reports of one run.
    style: Any = {**_STYLE, "svg.hashsalt": title}
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Fixed sizes would keep the page from scaling the figure; the viewBox stays.
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', rf'<svg role="img" aria-label="{title}" \1', text, count=1).replace(
        ' height="' + _height(text) + '"', "", 1
    )


def _height(svg: str) -> str:
    match = re.search(r'<svg [^>]*?\bheight="([^"]*)"', svg)
    assert match is not None
    return match.group(1)
