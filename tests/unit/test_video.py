from dataclasses import replace

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests.fake_episodes import make_task, make_trajectory, moving_square
from vlarl_ray.report.video import EpisodeFilm, film_trajectory, video_path, write_before_after_video


def read_video(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def solid_film(values, env_steps, *, first_success=None, size=64):
    frames = np.stack([np.full((size, size, 3), value, np.uint8) for value in values])
    return EpisodeFilm("drawer-close-v3", 0, frames, tuple(env_steps), first_success)


def brightness(frames):
    """Mean of the picture (below the caption) on the left and the right, per frame."""
    half = frames.shape[2] // 2
    return frames[:, 100:250, 60 : half - 60].mean((1, 2, 3)), frames[:, 100:250, half + 60 : -60].mean((1, 2, 3))


def test_film_is_h264_large_enough_and_has_a_poster(tmp_path):
    task = make_task(split="eval", max_env_steps=40)
    before, after = make_trajectory(task), make_trajectory(task, first_success=12)
    path = write_before_after_video(
        video_path(tmp_path, task.task_id, 0),
        film_trajectory(before, moving_square(before.num_decisions + 1)),
        film_trajectory(after, moving_square(after.num_decisions + 1)),
    )
    meta, frames = read_video(path)
    assert meta["codec"] == "h264"
    assert min(frames.shape[1:3]) >= 256
    assert frames.shape[2] % 16 == frames.shape[1] % 16 == 0
    assert Image.open(path.with_suffix(".png")).size == meta["size"]
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".mp4", ".png"], "no temporary file is left"


def test_shorter_film_holds_its_last_frame(tmp_path):
    before = solid_film([50, 100, 150, 200], [0, 5, 10, 15])
    after = solid_film([50, 100], [0, 5], first_success=4)
    path = write_before_after_video(tmp_path / "v.mp4", before, after, fps=10.0)
    left, right = brightness(read_video(path)[1])
    assert left[:4] == pytest.approx([50, 100, 150, 200], abs=6)
    assert right[:4] == pytest.approx([50, 100, 100, 100], abs=6)
    assert len(left) == 4 + 15


def test_films_with_unlike_frame_intervals_share_one_clock_of_env_steps(tmp_path):
    per_step = solid_film(range(20, 140, 20), range(6))
    per_decision = solid_film([30, 200], [0, 5])
    left, right = brightness(read_video(write_before_after_video(tmp_path / "v.mp4", per_step, per_decision))[1])
    assert left[:6] == pytest.approx([20, 40, 60, 80, 100, 120], abs=6)
    assert right[:6] == pytest.approx([30, 30, 30, 30, 30, 200], abs=6)


def test_success_inside_a_chunk_does_not_speed_up_the_film(tmp_path):
    film = solid_film([50, 100, 150, 200], [0, 5, 10, 12], first_success=12)
    left, _ = brightness(read_video(write_before_after_video(tmp_path / "v.mp4", film, film))[1])
    assert left[:4] == pytest.approx([50, 100, 150, 200], abs=6)


def test_caption_turns_to_success_at_the_first_successful_step(tmp_path):
    failing = solid_film([90, 90, 90], [0, 5, 10])
    _, plain = read_video(write_before_after_video(tmp_path / "a.mp4", failing, failing))
    _, solved = read_video(
        write_before_after_video(tmp_path / "b.mp4", failing, replace(failing, first_success_env_step=10))
    )
    half = plain.shape[2] // 2
    change = np.abs(plain[:, :48].astype(int) - solved[:, :48]).max((1, 3))
    assert change[:2].max() < 40, "nothing announces the success before it happens"
    assert change[2, half:].max() > 80
    assert change[2, :half].max() < 40, "the left film did not succeed"


def test_films_of_unlike_starts_are_refused(tmp_path):
    film = solid_film([1], [0])
    with pytest.raises(ValueError, match="same held-out start"):
        write_before_after_video(tmp_path / "v.mp4", film, replace(film, init_state_id=1))


def test_frame_without_a_time_is_refused(tmp_path):
    film = solid_film([1, 2], [0])
    with pytest.raises(ValueError, match="before has 2 frames at 1 env steps"):
        write_before_after_video(tmp_path / "v.mp4", film, film)


def test_film_takes_env_steps_of_chunks_and_one_camera():
    trajectory = make_trajectory(first_success=12)
    frames = np.concatenate([moving_square(4), moving_square(4, hue=1)], axis=1)
    film = film_trajectory(trajectory, frames, camera=1)
    assert film.env_steps == (0, 5, 10, 12)
    assert np.array_equal(film.frames, moving_square(4, hue=1)[:, 0])


def test_task_id_with_odd_characters_stays_inside_the_videos_folder(tmp_path):
    assert video_path(tmp_path, "../suite/pick up", 3) == tmp_path / "videos" / ".._suite_pick_up-state3.mp4"
