"""The `vlarl` command: parse, check the config, then import what the command needs and run it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlarl_ray.config import ExperimentConfig
    from vlarl_ray.config_loader import Purpose

EXIT_OK, EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

_FLAGS = ("-h", "--help", "--inline", "--resume", "--adapter")
_CONFIG_USAGE = "vlarl {name} [PRESET.yaml] {flags}[--run-dir DIR] [--seed N] [--section.field value ...]"


@dataclass(frozen=True)
class Command:
    """One sub-command."""

    summary: str
    run: Callable[[argparse.Namespace, list[str]], int]
    """Takes the flags and the config overrides; returns the exit code."""
    flags: tuple[str, ...] = ()
    takes_config: bool = True
    more_usage: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vlarl` and return its exit code: 0 done, 2 the user can mend it, 1 anything else.

    Args:
        argv: Arguments after the program name; None takes those of the process.
    """
    words, overrides = _split(list(sys.argv[1:] if argv is None else argv))
    try:
        args = _parser().parse_args(words)
    except SystemExit as end:  # argparse has printed its help or its error
        return end.code if isinstance(end.code, int) else EXIT_USER_ERROR
    command = COMMANDS[args.command]
    if args.help:
        return _print(_help(args.command, command))
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for the user's own classes, as with `python -m`; Ray's workers have it anyway
    try:
        return command.run(args, overrides)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        if not _is_for_the_user(error):
            traceback.print_exc()
            return EXIT_FAILURE
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    except Exception:  # noqa: BLE001 - the border of the process: whatever it is, it ends with its traceback
        traceback.print_exc()
        return EXIT_FAILURE


def _is_for_the_user(error: Exception) -> bool:
    """Tell an error that the package raises itself, and which says what to mend, from a defect that surfaced as one."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return os.path.dirname(__file__) in frame.filename and (frame.line or "").startswith("raise ")


def _split(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Separate config overrides (`--key value`, `--key=value`) from the words and flags of the command."""
    words, overrides = [], []
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token in _FLAGS:
            words.append(token)
            continue
        overrides.append(token)
        if "=" not in token and tokens and not tokens[0].startswith("--"):
            overrides.append(tokens.pop(0))
    return words, overrides


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:9} {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="vlarl",
        usage="vlarl COMMAND ...",
        description="Reinforcement-learning post-training of vision-language-action policies in simulation, on Ray.",
        epilog=f"commands:\n{listed}\n\n'vlarl COMMAND --help' lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, usage=_usage(name, command), add_help=False, allow_abbrev=False)
        sub.add_argument("-h", "--help", action="store_true")
        sub.add_argument("target", nargs="?")
        for flag in command.flags:
            sub.add_argument(flag, action="store_true")
    return parser


def _usage(name: str, command: Command) -> str:
    if not command.takes_config:
        return f"vlarl {name} [RUN_DIR]{command.more_usage}"
    return _CONFIG_USAGE.format(name=name, flags="".join(f"[{flag}] " for flag in command.flags))


def _help(name: str, command: Command) -> str:
    text = f"usage: {_usage(name, command)}\n\n{command.summary}"
    if not command.takes_config:
        return text
    from vlarl_ray.config_fields import format_fields

    flags = {
        "--inline": "run everything in this process, without Ray, on one learner rank: slower, and a debugger works",
        "--resume": "go on with the run that is in the run folder",
    }
    listed = "".join(f"\n  {flag:10} {flags[flag]}" for flag in command.flags)
    return f"{text}\n{listed}\n\nA preset holds differences from these defaults; values are YAML.\n{format_fields()}"


def _print(text: str) -> int:
    """Write to stdout, which may be a pager that is closed early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit does not flush into it again
    return EXIT_OK


def _config(args: argparse.Namespace, overrides: list[str], *, purpose: Purpose = "other") -> ExperimentConfig:
    from vlarl_ray.config_loader import load_config

    return load_config(args.target, overrides, purpose=purpose)


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    config = _config(args, overrides, purpose="resume" if args.resume else "train")
    from vlarl_ray import launch

    return launch.run_training(config, inline=args.inline, resume=args.resume)


def _sft(args: argparse.Namespace, overrides: list[str]) -> int:
    config = _config(args, overrides)
    from vlarl_ray import launch

    return launch.run_sft(config)


def _collect(args: argparse.Namespace, overrides: list[str]) -> int:
    config = _config(args, overrides)
    from vlarl_ray import launch

    return launch.run_collect(config)


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> int:
    from vlarl_ray.config_loader import ConfigError, run_dir_of

    config = _config(args, overrides)
    own = [os.path.join(run_dir_of(config), name) for name in ("policy_final", "policy")]
    policy = config.policy or next(filter(os.path.isdir, own), None)
    if policy is None:
        raise ConfigError(
            [f"policy = null: {own[0]} is no folder; name the policy folder to evaluate (--policy FOLDER)."]
        )
    from vlarl_ray import launch

    return launch.run_evaluate(config, policy)


def _report(args: argparse.Namespace, overrides: list[str]) -> int:
    run_dir = _run_dir(args, overrides)
    from vlarl_ray.report.html import write_report

    return _print(str(write_report(run_dir)))


def _doctor(args: argparse.Namespace, overrides: list[str]) -> int:
    preset, overrides = _take(overrides, "--preset")
    if preset is None:
        run_dir, job = _run_dir(args, overrides, default="runs"), None
    else:
        from vlarl_ray.config_loader import load_config, run_dir_of

        job = load_config(preset, overrides)
        run_dir = args.target or run_dir_of(job)
    from vlarl_ray import doctor

    findings = doctor.examine(run_dir)
    lines = list(map(str, findings))
    if job is not None:
        plan = doctor.plan_of(job)
        of_job = [*filter(None, [doctor.check_suite(job), doctor.check_server(job)]), doctor.check_memory(job, plan)]
        findings += of_job
        lines += [*map(str, of_job), plan.table]
    _print("\n".join(lines))
    return EXIT_OK if all(finding.ok for finding in findings) else EXIT_FAILURE


def _export(args: argparse.Namespace, overrides: list[str]) -> int:
    target, overrides = _take(overrides, "--to")
    run_dir = _run_dir(args, overrides)
    if target is None:
        raise ValueError("--to is missing; write vlarl export RUN_DIR --to FOLDER.")
    from pathlib import Path

    from vlarl_ray.checkpoint import is_checkpoint
    from vlarl_ray.models.policy_export import export_policy
    from vlarl_ray.trained_policy import export_adapter, export_checkpoint

    source, folder = Path(run_dir), Path(target)
    if args.adapter:
        return _print(str(export_adapter(source, folder)))
    if is_checkpoint(run_dir):
        return _print(str(export_checkpoint(source, folder)))
    own = [path for name in ("policy_final", "policy") if (path := source / name).is_dir()]
    return _print(str(export_policy(own[0] if own else source, folder)))


def _take(overrides: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take an option that is no config field, `--name value` or `--name=value`, out of the overrides."""
    value, rest, words = None, [], list(overrides)
    while words:
        word = words.pop(0)
        if word == name and words:
            value = words.pop(0)
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def _run_dir(args: argparse.Namespace, overrides: list[str], default: str | None = None) -> str:
    """Read the run folder, given as a word or as `--run-dir`."""
    from vlarl_ray.config_loader import ConfigError, load_config

    config = load_config(None, overrides)
    run_dir = args.target or config.run_dir or default
    if run_dir is None:
        raise ConfigError([f"run_dir is missing; write vlarl {args.command} RUN_DIR."])
    return run_dir


COMMANDS = {
    "train": Command(
        "Warm-start a policy on demonstrations, improve it by RL, evaluate it, write the report.",
        _train,
        flags=("--inline", "--resume"),
    ),
    "sft": Command("Fine-tune a new policy on demonstrations.", _sft),
    "evaluate": Command(
        "Evaluate a policy (--policy FOLDER, or the run folder's own) on held-out initial states.", _evaluate
    ),
    "collect": Command("Collect demonstrations with the scripted experts.", _collect),
    "report": Command("Write report.html of a run folder.", _report, takes_config=False),
    "export": Command(
        "Write the policy of a run, a checkpoint or a policy folder in the published layout of OpenVLA, OpenVLA-OFT or "
        "QueST; with --adapter, a run's or checkpoint's adapters as PEFT reads them, heads beside them.",
        _export,
        flags=("--adapter",),
        takes_config=False,
        more_usage=" --to FOLDER [--adapter]",
    ),
    "doctor": Command(
        "Check what this machine offers (OpenGL, torch, Ray, disk, memory), and what a preset's tensors need of it.",
        _doctor,
        takes_config=False,
        more_usage=" [--preset PRESET.yaml [--section.field value ...]]",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
