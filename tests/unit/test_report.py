import json
import re
from html.parser import HTMLParser

import pytest

from tests.fake_episodes import QUIET, TASKS, FakeSuite, make_evaluation, make_trajectory
from tests.fake_run_folder import write_run_folder
from vlarl_ray.evaluation_results import summarize_evaluation
from vlarl_ray.metrics import MetricsLogger, summarize_rollout
from vlarl_ray.report.html import write_report
from vlarl_ray.report.run_data import read_run
from vlarl_ray.summary import read_summary


class Page(HTMLParser):
    """Collects attributes, the cells of every table row, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.table, self.words, self._cell = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "poster", "xlink:href"}]
        if tag == "tr":
            self.table.append([])
        self._cell = tag in {"td", "th"}

    def handle_endtag(self, tag):
        self._cell = False

    def handle_data(self, data):
        self.words.append(data)
        if self._cell:
            self.table[-1].append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_run_folder(tmp_path_factory.mktemp("run") / "laptop", num_updates=3)
    return folder, write_report(folder).read_text()


def log_one_update(folder, tasks=TASKS):
    log = MetricsLogger(folder, QUIET)
    log.log(summarize_rollout([make_trajectory()], 1.0), iteration=0, version=1)
    return log


def log_evaluation(log, label, episodes, suite=None, tasks=TASKS):
    result = summarize_evaluation(episodes, suite or FakeSuite(), task_ids=tasks, states_per_task=4)
    log.log_evaluation(result.to_dict(), result.metrics(), label=label, iteration=1, version=1)


def test_page_loads_nothing_but_the_films_of_the_folder(finished):
    folder, text = finished
    page = Page(text)
    outside = [link for link in page.links if not link.startswith("#")]
    assert len(outside) == 2 * len(TASKS)
    assert all((folder / link).is_file() for link in outside)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "url(http" not in text
    assert "@import" not in text


def test_table_shows_before_and_after_of_each_task_with_intervals_and_expert(finished):
    folder, text = finished
    rows = {row[0]: row for row in Page(text).table if len(row) == 7}
    assert set(rows) == {"task", *TASKS, "all"}
    assert rows["task"][2:4] == ["success, before RL", "success, after RL"]
    before, after = read_run(folder).before, read_run(folder).after
    for shown, evaluation in zip(rows["all"][2:4], (before, after), strict=True):
        low, high = 100 * evaluation["ci_low"], 100 * evaluation["ci_high"]
        assert shown == f"{100 * evaluation['success_rate']:.1f} % [{low:.0f}, {high:.0f}]"
    assert rows[TASKS[0]][1] == "50"
    assert rows["all"][6] == "78.0"


def test_summary_and_page_agree(finished):
    folder, text = finished
    summary = read_summary(folder)
    expected = f"{100 * summary.warm_start['success_rate']:.0f} % → {100 * summary.final['success_rate']:.0f} %"
    words = Page(text).words
    assert expected in words
    assert "702 kB / 3.64 MB" in words


def test_every_figure_is_there_and_ids_of_different_figures_do_not_collide(finished):
    _, text = finished
    assert text.count("<svg ") == text.count("</svg>") == 4
    clips = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(clips) == len(set(clips)) > 4


def test_report_of_one_run_is_the_same_every_time(finished):
    folder, text = finished
    assert write_report(folder).read_text() == text
    assert not (folder / "report.html.tmp").exists()


def test_everything_from_the_run_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>$x&y_"
    (tmp_path / "config.json").write_text(json.dumps({"name": evil, "seed": 1, "env": {"tasks": [evil]}}))
    log = MetricsLogger(tmp_path, QUIET)
    log_evaluation(log, "warm_start", make_evaluation([evil]), tasks=[evil])
    log.log(summarize_rollout([make_trajectory()], 1.0), iteration=0, version=1)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a\"onerror='b' c.mp4").touch()
    text = write_report(tmp_path).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.links[-1] == "videos/a%22onerror%3D%27b%27%20c.mp4"
    assert evil in page.words, "it is shown, as text"


@pytest.mark.parametrize("label", ["warm_start", "update", None])
def test_unfinished_run_gets_what_there_is(tmp_path, label):
    log = log_one_update(tmp_path)
    if label is not None:
        log_evaluation(log, label, make_evaluation(success=lambda task, s: False))
    words = " ".join(Page(write_report(tmp_path).read_text()).words)
    assert "not finished: 1 iterations so far" in words
    assert ("No evaluation has been logged yet" in words) == (label is None)
    assert ("after 1 updates" in words) == (label == "update")


def test_run_killed_before_its_first_update_gets_a_page(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "early"}')
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "ver')
    assert "No update has been logged yet." in write_report(tmp_path).read_text()


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        write_report(tmp_path)


def test_shared_starts_and_unlike_decoding_are_announced(tmp_path):
    log = log_one_update(tmp_path)
    log_evaluation(log, "warm_start", make_evaluation())
    assert "shared-init" not in write_report(tmp_path).read_text()
    sampled = [
        make_trajectory(type(t.task)(**{**vars(t.task), "temperature": 1.0}), first_success=11)
        for t in make_evaluation()
    ]
    log_evaluation(log, "final", sampled, FakeSuite(shared=[1]))
    text = write_report(tmp_path).read_text()
    assert '<div class="note"><b>shared-init</b>' in text
    assert "Decoding differs before and after" in text


def test_rollouts_and_evaluations_share_one_axis_of_env_steps(tmp_path):
    folder = write_run_folder(tmp_path / "run", num_updates=3, videos=False)
    run = read_run(folder)
    steps = [row["rollout/env_steps"] for row in run.rows]
    assert run.env_steps_before() == {0: 0, 1: steps[0], 2: sum(steps[:2]), 3: sum(steps)}
    assert [e["iteration"] for e in run.evaluations] == [0, 2, 3]


def test_many_tasks_leave_out_the_panels_by_task_but_not_the_rows(tmp_path):
    tasks = tuple(f"task-{i}" for i in range(13))
    text = write_report(write_run_folder(tmp_path / "run", num_updates=1, tasks=tasks, videos=False)).read_text()
    assert "Success by task" not in text
    assert {row[0] for row in Page(text).table if row} >= set(tasks)
