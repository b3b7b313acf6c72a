"""Films of the same held-out start before and after training, side by side, as MP4 with a poster image."""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vlarl_ray.types import Trajectory

_MIN_SIDE = 256
_BAR_HEIGHT = 48
_GAP = 8
_HOLD_S = 1.5
_BACKGROUND = (22, 24, 29)
_TEXT = (235, 236, 240)
_MUTED = (150, 154, 164)
_SUCCESS = (88, 196, 122)


@dataclass(frozen=True)
class EpisodeFilm:
    """Frames of one episode and when they were taken."""

    task_id: str
    init_state_id: int
    frames: UInt8[np.ndarray, "N H W 3"]
    """RGB, upright; one per decision or per env step."""
    env_steps: tuple[int, ...]
    """Env steps executed before each frame, N, increasing."""
    first_success_env_step: int | None


def film_trajectory(trajectory: Trajectory, frames: UInt8[np.ndarray, "S1 V H W 3"], *, camera: int = 0) -> EpisodeFilm:
    """Make a film of what one camera saw at the decision points of an episode.

    Args:
        trajectory: The episode.
        frames: Its frames (`trajectory.frames` fetched), S+1 of them.
        camera: Which of the V cameras.
    """
    steps = np.concatenate([[0], np.cumsum(trajectory.num_env_steps)])
    return EpisodeFilm(
        task_id=trajectory.task.task_id,
        init_state_id=trajectory.task.init_state_id,
        frames=frames[:, camera],
        env_steps=tuple(int(step) for step in steps),
        first_success_env_step=trajectory.first_success_env_step,
    )


def video_path(run_dir: str | Path, task_id: str, init_state_id: int) -> Path:
    """Where the film of a held-out start belongs: `videos/<task>-state<id>.mp4`."""
    return Path(run_dir) / "videos" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task_id)}-state{init_state_id}.mp4"


def write_before_after_video(path: Path, before: EpisodeFilm, after: EpisodeFilm, *, fps: float = 12.0) -> Path:
    """Write both films side by side on one clock of env steps; the shorter one holds its last frame.

    Args:
        path: MP4 file to write; the poster (the last frame) goes next to it as PNG. Both appear whole or not at all.
        before: Episode of the warm start.
        after: Episode of the trained policy from the same initial state.
        fps: Frames a second; each advances both episodes by one frame interval of the finer film.

    Raises:
        ValueError: If the films start from different initial states, or a film is empty.
    """
    if (before.task_id, before.init_state_id) != (after.task_id, after.init_state_id):
        raise ValueError(
            f"before shows {before.task_id} from state {before.init_state_id}, after {after.task_id} from state "
            f"{after.init_state_id}; film the same held-out start before and after."
        )
    for name, film in (("before", before), ("after", after)):
        if not len(film.frames) == len(film.env_steps) >= 1:
            raise ValueError(
                f"{name} has {len(film.frames)} frames at {len(film.env_steps)} env steps; give one for each."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    clock = _clock(before, after)
    frames = [_side_by_side(before, after, env_step) for env_step in clock]
    frames += [frames[-1]] * round(_HOLD_S * fps)
    _encode(path, frames, fps)
    poster = path.with_suffix(".png.tmp")
    Image.fromarray(frames[-1]).save(poster, format="PNG", optimize=True)
    poster.replace(path.with_suffix(".png"))
    return path


def _clock(before: EpisodeFilm, after: EpisodeFilm) -> list[int]:
    """Env steps at which a frame is shown: the finer film's interval, up to the end of the longer one."""
    intervals = [b - a for film in (before, after) for a, b in zip(film.env_steps, film.env_steps[1:], strict=False)]
    # The median: an episode's last interval is shorter where success came inside a chunk.
    interval = max(1, int(np.median(intervals))) if intervals else 1
    end = max(before.env_steps[-1], after.env_steps[-1])
    return [*range(0, end, interval), end]


def _side_by_side(before: EpisodeFilm, after: EpisodeFilm, env_step: int) -> UInt8[np.ndarray, "h w 3"]:
    panels = [_panel(before, "before RL", env_step), _panel(after, "after RL", env_step)]
    width = sum(panel.width for panel in panels) + _GAP
    height = max(panel.height for panel in panels)
    # H.264 with 4:2:0 chroma needs even sides; multiples of 16 spare the encoder's own rescaling.
    canvas = Image.new("RGB", (_round_up(width), _round_up(height)), _BACKGROUND)
    left = (canvas.width - width) // 2
    for panel in panels:
        canvas.paste(panel, (left, 0))
        left += panel.width + _GAP
    return np.asarray(canvas)


def _panel(film: EpisodeFilm, title: str, env_step: int) -> Image.Image:
    index = int(np.searchsorted(film.env_steps, env_step, side="right")) - 1
    frame = film.frames[index]
    scale = max(1, math.ceil(_MIN_SIDE / min(frame.shape[:2])))
    picture = Image.fromarray(frame).resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.Resampling.NEAREST)
    panel = Image.new("RGB", (picture.width, picture.height + _BAR_HEIGHT), _BACKGROUND)
    panel.paste(picture, (0, _BAR_HEIGHT))
    draw = ImageDraw.Draw(panel)
    state, color = _state(film, env_step)
    step_shown = min(env_step, film.env_steps[-1])
    _text_line(draw, panel.width, 6, (title, _TEXT), (f"env step {step_shown}", _MUTED))
    _text_line(draw, panel.width, 27, (film.task_id, _MUTED), (state, color))
    return panel


def _state(film: EpisodeFilm, env_step: int) -> tuple[str, tuple[int, int, int]]:
    first = film.first_success_env_step
    if first is not None and env_step >= first:
        return f"success at {first}", _SUCCESS
    if env_step >= film.env_steps[-1]:
        return "no success", _TEXT
    return "", _MUTED


def _text_line(
    draw: ImageDraw.ImageDraw,
    width: int,
    top: int,
    left_part: tuple[str, tuple[int, int, int]],
    right_part: tuple[str, tuple[int, int, int]],
) -> None:
    """Draw one line with a left and a right part; the left one is cut where they would meet."""
    font = ImageFont.load_default(size=13)
    margin = 8
    right_width = draw.textlength(right_part[0], font=font)
    draw.text((width - margin - right_width, top), right_part[0], fill=right_part[1], font=font)
    text = left_part[0]
    room = width - 3 * margin - right_width
    while len(text) > 1 and draw.textlength(text, font=font) > room:
        text = text.removesuffix("…")[:-1] + "…"
    draw.text((margin, top), text, fill=left_part[1], font=font)


def _encode(path: Path, frames: list[UInt8[np.ndarray, "h w 3"]], fps: float) -> None:
    height, width = frames[0].shape[:2]
    temporary = path.with_name(path.stem + ".tmp.mp4")
    writer: Generator[None, np.ndarray | None, None] = imageio_ffmpeg.write_frames(
        str(temporary),
        (width, height),
        fps=fps,  # pyright: ignore[reportArgumentType] -- ffmpeg takes fractions too
        codec="libx264",
        pix_fmt_out="yuv420p",
        macro_block_size=16,
        quality=None,  # pyright: ignore[reportArgumentType] -- the package means "leave it to output_params"
        # crf 20 keeps the nearest-neighbour edges sharp; faststart lets a browser play while it loads.
        output_params=["-crf", "20", "-preset", "fast", "-movflags", "+faststart"],
        ffmpeg_log_level="error",
    )
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()
    temporary.replace(path)


def _round_up(side: int, multiple: int = 16) -> int:
    return math.ceil(side / multiple) * multiple
