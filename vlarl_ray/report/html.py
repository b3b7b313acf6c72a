"""The one-page report of a run, from the run folder's files alone; the page loads nothing from a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlarl_ray.report.plots import diagnostics, learning_curves, task_curves, time_split
from vlarl_ray.report.run_data import RunData, read_run

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; }
body { margin: 0 auto; max-width: 1040px; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 36px 0 10px; }
.muted { color: #5b616b; } .small { font-size: 13px; }
.note { border-left: 4px solid #D55E00; background: #fdf3ec; padding: 8px 12px; margin: 12px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 10px; margin: 18px 0; }
.tile { border: 1px solid #e1e4e8; border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 20px; } .tile span { color: #5b616b; font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid #e6e8eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: #5b616b; font-weight: 600; }
tr.all td { font-weight: 600; border-top: 2px solid #9aa0a8; }
svg { width: 100%; height: auto; display: block; }
.bar { height: 16px; background: #0072B2; border-radius: 3px; min-width: 2px; } .bar.whole { background: #c9ced6; }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 14px; }
figure { margin: 0; } video { width: 100%; border-radius: 6px; background: #16181d; }
figcaption { font-size: 13px; color: #5b616b; }
pre { background: #f6f8fa; padding: 12px; overflow-x: auto; font-size: 12px; border-radius: 6px; }
"""


_ABSENT = "-"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all; a run that is not finished gets what there is.

    Args:
        run_dir: Run folder on a local (or mounted) file system.

    Returns:
        Path of the page. It links the films in `videos/` relatively, so it moves with the folder.

    Raises:
        ValueError: If the folder holds no run.
    """
    run = read_run(run_dir)
    path = run.run_dir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(_page(run), encoding="utf-8")
    temporary.replace(path)
    return path


def _page(run: RunData) -> str:
    sections = [_header(run), _notes(run), _tiles(run), _results(run)]
    if run.rows:
        by_task = task_curves(run)
        sections += [
            "<h2>Learning</h2>"
            '<p class="muted small">A point at n updates shows the policy that n updates have made.</p>'
            + learning_curves(run),
            f"<h2>Success by task</h2>{by_task}" if by_task else "",
            "<h2>Where the time goes</h2>" + time_split(run),
            _published(run),
            "<h2>Diagnostics</h2>" + diagnostics(run),
        ]
    else:
        sections.append('<p class="muted">No update has been logged yet.</p>')
    sections += [_films(run), _config(run)]
    body = "\n".join(section for section in sections if section)
    title = escape(f"{run.name}: run report")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _header(run: RunData) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.summary.versions.items())
    tasks = ", ".join(run.config.get("env", {}).get("tasks", ()))
    state = "finished" if run.is_finished else f"not finished: {len(run.rows)} iterations so far"
    seed = run.config.get("seed")
    first = f"seed {seed} · " if seed is not None else ""
    lines = [f"{first}{state}", f"Tasks: {tasks}" if tasks else "", run.summary.machine, versions]
    shown = "".join(f'<div class="muted small">{escape(line)}</div>' for line in lines if line)
    return f"<header><h1>{escape(run.name)}</h1>{shown}</header>"


def _notes(run: RunData) -> str:
    """What a reader must know before believing a comparison."""
    notes = []
    if any(e.get("split") == "shared-init" for e in run.evaluations):
        notes.append(
            "<b>shared-init</b>: some evaluated initial states are also training states; these are no held-out figures."
        )
    before, after = run.before, run.after
    if before and after and before.get("temperature") != after.get("temperature"):
        notes.append("Decoding differs before and after (temperature), so the two are not comparable.")
    done, planned = run.summary.iterations, run.summary.planned_iterations
    if run.is_finished and done is not None and planned is not None and done < planned:
        notes.append(
            f"<b>Ended early</b>: {done} of {planned} planned iterations; the time or env steps allowed were used up."
        )
    if run.config.get("rollout", {}).get("shuffle_rewards"):
        notes.append("<b>Negative control</b>: rewards were shuffled; success is not supposed to rise.")
    return "".join(f'<div class="note">{note}</div>' for note in notes)


def _tiles(run: RunData) -> str:
    summary, before, after = run.summary, run.before, run.after
    published = _bytes(summary.published_bytes_per_update)
    tiles = [
        ("held-out success, before → after", _arrow(before, after, "success_rate", lambda v: f"{100 * v:.0f} %")),
        ("steps to success, before → after", _arrow(before, after, "steps_to_success", lambda v: f"{v:.0f}")),
        ("scripted expert's steps", _number(summary.expert_steps_to_success, ".0f")),
        ("RL part / whole run", f"{_duration(summary.rl_seconds)} / {_duration(summary.total_seconds)}"),
        ("training env steps", _number(summary.env_steps, ",d")),
        ("env steps a second, during rollouts", _number(summary.env_steps_per_s, ",.0f")),
        ("peak memory", _bytes(summary.peak_rss_bytes)),
        ("published an update / full model", f"{published} / {_bytes(summary.model_bytes)}"),
    ]
    known = [(label, value) for label, value in tiles if any(character.isdigit() for character in value)]
    cells = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(label)}</span></div>' for label, v in known)
    return f'<div class="tiles">{cells}</div>'


def _results(run: RunData) -> str:
    before, after = run.before, run.after
    newest = after or before
    if newest is None:
        return '<h2>Evaluation</h2><p class="muted">No evaluation has been logged yet.</p>'
    columns = [e for e in (before, after) if e is not None]
    names = [escape(_evaluation_name(e)) for e in columns]
    heads = ["task", "episodes", *(f"success, {n}" for n in names), *(f"steps, {n}" for n in names), "expert"]
    expert = run.summary.expert_steps_to_success_per_task
    lines = [
        _result_row("", row["task_id"], [_task_row(e, row["task_id"]) for e in columns], expert.get(row["task_id"]))
        for row in newest.get("per_task", ())
    ]
    lines.append(_result_row(' class="all"', "all", columns, run.summary.expert_steps_to_success))
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'<h2>Evaluation</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="muted small">{escape(_protocol(newest))}</p>'
    )


def _protocol(evaluation: Mapping[str, Any]) -> str:
    temperature, shared = evaluation.get("temperature"), evaluation.get("num_shared_init_states")
    decoding = "greedy decoding" if temperature == 0 else f"sampling at temperature {temperature}"
    split = f"{evaluation.get('split')} initial states" + (f" ({shared} shared with training)" if shared else "")
    return (
        f"{split}, each task and state once; {decoding}; success at any env step, with 95 % Wilson intervals. "
        "Steps: mean first successful env step over successes; in brackets over all episodes, a failure counting "
        f"the horizon of {evaluation.get('max_env_steps')}. Expert: the scripted expert's, over its successes."
    )


def _result_row(attributes: str, task: str, columns: Sequence[Mapping[str, Any]], expert: float | int | None) -> str:
    cells = [escape(task), str(columns[-1].get("episodes", _ABSENT))]
    for e in columns:
        interval = f"[{100 * e['ci_low']:.0f}, {100 * e['ci_high']:.0f}]" if e else ""
        cells.append(f"{100 * e['success_rate']:.1f} % {interval}" if e else _ABSENT)
    cells += [
        f"{_number(e['steps_to_success'], '.1f')} ({e['steps_to_success_all']:.1f})" if e else _ABSENT for e in columns
    ]
    cells.append(_number(expert, ".1f"))
    return f"<tr{attributes}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _task_row(evaluation: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    return next((row for row in evaluation.get("per_task", ()) if row["task_id"] == task), {})


def _evaluation_name(evaluation: Mapping[str, Any]) -> str:
    names = {"warm_start": "before RL", "final": "after RL"}
    return names.get(evaluation["label"], f"after {evaluation['iteration']} updates")


def _published(run: RunData) -> str:
    _, published = run.series("publish/bytes")
    model = run.summary.model_bytes or next(iter(run.series("publish/model_bytes")[1]), None)
    if not published or not model:
        return ""
    mean = sum(published) / len(published)
    bars = (("adapter and heads, each update", mean, "bar"), ("the full model", float(model), "bar whole"))
    largest = max(mean, float(model))
    lines = "".join(
        f'<tr><td>{label}</td><td>{_bytes(size)}</td><td style="width:60%"><div class="{kind}" '
        f'style="width:{100 * size / largest:.2f}%"></div></td></tr>'
        for label, size, kind in bars
    )
    return f"<h2>Published weights</h2><table><tbody>{lines}</tbody></table>"


def _films(run: RunData) -> str:
    if not run.films:
        return ""
    figures = []
    for film in run.films:
        source = escape(quote(film.as_posix()), quote=True)
        poster = film.with_suffix(".png")
        shown = f' poster="{escape(quote(poster.as_posix()), quote=True)}"' if (run.run_dir / poster).exists() else ""
        figures.append(
            f'<figure><video controls muted loop playsinline preload="metadata"{shown} src="{source}"></video>'
            f"<figcaption>{escape(film.stem)}</figcaption></figure>"
        )
    return f'<h2>The same held-out starts, before and after</h2><div class="films">{"".join(figures)}</div>'


def _config(run: RunData) -> str:
    if not run.config:
        return ""
    text = escape(json.dumps(run.config, indent=2))
    return f"<h2>Configuration</h2><details><summary>Every setting of this run</summary><pre>{text}</pre></details>"


def _arrow(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, name: str, form: Callable[[Any], str]
) -> str:
    values = [form(e[name]) if e and e[name] is not None else _ABSENT for e in (before, after)]
    return f"{values[0]} → {values[1]}"


def _number(value: float | int | None, form: str) -> str:
    return _ABSENT if value is None else format(value, form)


def _duration(seconds: float | int | None) -> str:
    if seconds is None:
        return _ABSENT
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _bytes(size: float | int | None) -> str:
    if size is None:
        return _ABSENT
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
