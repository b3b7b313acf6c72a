"""From preset and command line to a checked `ExperimentConfig`, with all errors at once. Imports neither torch nor ray.

preset, then overrides -> one nested dict -> types, ranges, names -> cross-field checks -> ExperimentConfig
                                                    |                      |
                                                    +------ problems ------+-> ConfigError (all of them)
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_checks import Problem, check_config, check_start
from vlarl_ray.config_fields import field_docs, format_value
from vlarl_ray.registry import suggest
from vlarl_ray.run_folder import check_run_dir, run_dir_of

__all__ = ["ConfigError", "Purpose", "config_from_json", "config_to_json", "load_config", "run_dir_of"]

Purpose = Literal["train", "resume", "other"]


class ConfigError(ValueError):
    """What is wrong with a config, one line per problem, for the user to mend."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"The configuration has {count}:\n" + "\n".join(f"  - {line}" for line in problems))


def load_config(preset: str | None, overrides: Sequence[str], *, purpose: Purpose = "other") -> ExperimentConfig:
    """Read a preset, apply overrides, and check everything that needs no cluster.

    Args:
        preset: YAML file holding only differences from the defaults; None starts from the defaults.
        overrides: Command-line tokens: `--section.field value` or `--section.field=value`, values in YAML.
        purpose: `train` wants a run folder that holds no run, `resume` accepts the same run; `other` does not look.

    Raises:
        ConfigError: Naming every problem found.
    """
    problems: list[Problem] = []
    tree = _read_preset(preset, problems) if preset is not None else {}
    _apply_overrides(tree, overrides, problems)
    config, broken = _validate(tree, problems)
    if config is not None:
        checks = check_config(config)
        if purpose != "other":
            checks += [*check_start(config), *check_run_dir(config, resume=purpose == "resume")]
        # a check on a field that was reset to its default would speak of a value the user never wrote
        problems += [problem for problem in checks if not broken & set(problem.fields)]
    if problems or config is None:
        raise ConfigError([problem.message for problem in problems])
    return config


def config_to_json(config: ExperimentConfig) -> str:
    """Write the resolved config, every default included."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_json(text: str) -> ExperimentConfig:
    """Read what `config_to_json` wrote.

    Raises:
        ConfigError: If it is not a config of this version of the package.
    """
    problems: list[Problem] = []
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"config.json is not JSON ({error}); the run folder is damaged."]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"config.json holds {type(tree).__name__}, not a configuration; the run folder is damaged."])
    config, _ = _validate(tree, problems)
    if problems or config is None:
        raise ConfigError([problem.message for problem in problems])
    return config


class _PresetLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and reads `1e-3` as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a signed exponent in a float; everyone writes 1e-3
_PresetLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str) -> Any:
    """Parse safe YAML into JSON types (a date becomes text).

    Raises:
        yaml.YAMLError: If it is not safe YAML.
    """
    loader = _PresetLoader(text)
    try:
        return json.loads(json.dumps(loader.get_single_data(), default=str))
    except (ValueError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _read_preset(preset: str, problems: list[Problem]) -> dict[str, Any]:
    path = Path(preset)
    if not path.is_file():
        nearby = sorted({str(file) for folder in (path.parent, Path("jobs")) for file in folder.glob("*.y*ml")})
        advice = suggest(preset, nearby) if nearby else "name a YAML file, or name none to start from the defaults"
        problems.append(Problem((), f"preset {preset!r} is no file; {advice}."))
        return {}
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(Problem((), f"preset {preset!r} is not plain YAML: {' '.join(str(error).split())}."))
        return {}
    if not isinstance(tree, dict | None):
        problems.append(
            Problem((), f"preset {preset!r} holds {type(tree).__name__}; write 'section:' with fields under it.")
        )
        return {}
    return tree or {}


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str], problems: list[Problem]) -> None:
    tokens = list(overrides)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            problems.append(Problem((), f"{token!r} is out of place; write --section.field value."))
            continue
        key, equals, text = token[2:].partition("=")
        if not equals:
            if not tokens or tokens[0].startswith("--"):
                problems.append(Problem((), f"--{key} has no value; write --{key} value."))
                continue
            text = tokens.pop(0)
        _set(tree, key.replace("-", "_"), text, problems)


def _set(tree: dict[str, Any], path: str, text: str, problems: list[Problem]) -> None:
    """Place one override in the tree, over whatever the preset says there."""
    doc = field_docs().get(path)
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError as error:
        problems.append(Problem((path,), f"{path} = {text!r} is not YAML: {' '.join(str(error).split())}."))
        return
    if not text.strip():
        problems.append(Problem((path,), f"{path} = {text!r}: is empty (an unset variable?); write null for none."))
        return
    if doc is not None and doc.is_text and value is not None and not (doc.is_list and isinstance(value, list)):
        value = text
    *sections, name = path.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[name] = value


def _validate(tree: dict[str, Any], problems: list[Problem]) -> tuple[ExperimentConfig | None, set[str]]:
    """Check types, ranges and names; broken fields fall back to defaults so that the other checks still run.

    Returns:
        The config (None if nothing could be made of the tree), and the paths that were reset.
    """
    adapter = TypeAdapter(ExperimentConfig)
    broken: set[str] = set()
    tree = copy.deepcopy(tree)
    for _ in range(2):  # once to find the errors, once without what they name
        try:
            return adapter.validate_json(json.dumps(tree), strict=True), broken
        except ValidationError as error:
            for item in error.errors(include_url=False):
                location = [part for part in item["loc"] if isinstance(part, str)]
                problems.append(Problem((), _explain(item["type"], item["loc"], item["input"])))
                broken.add(".".join(location))
                _drop(tree, location)
    return None, broken


def _drop(tree: Any, location: list[str]) -> None:
    *sections, name = location
    for section in sections:
        tree = tree.get(section) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree.pop(name, None)


def _explain(kind: str, location: tuple[int | str, ...], value: Any) -> str:
    """Phrase one pydantic error: field, value, what is allowed, what to do."""
    path = ".".join(str(part) for part in location if isinstance(part, str))
    # the input of a missing list entry is the whole list
    entries = [] if kind == "missing" else [part for part in location if isinstance(part, int)]
    shown = path + "".join(f"[{entry}]" for entry in entries)
    known = field_docs()
    if kind == "unexpected_keyword_argument":
        return f"{shown} = {value!r}: there is no such field; {_nearest(path)}"
    if path in known:
        doc = known[path]
        return f"{shown} = {value!r}: must be {doc.allowed}; mend it, or leave it out for {format_value(doc.default)}."
    members = [name.removeprefix(f"{path}.").split(".")[0] for name in known if name.startswith(f"{path}.")]
    return f"{shown} = {value!r}: is a section; give its fields by name ({', '.join(dict.fromkeys(members))})."


def _nearest(path: str) -> str:
    """Suggest the field whose own name is nearest, preferably in the same section, else list that section."""
    known = list(field_docs())
    section, _, name = path.rpartition(".")
    prefix = f"{section}." if section else ""
    siblings = {prefix + other.removeprefix(prefix).split(".")[0] for other in known if other.startswith(prefix)}
    ratios = {other: _similarity(name, other) + 0.1 * (other in siblings) for other in [*known, *siblings]}
    best = max(ratios.values())
    if best >= 0.7:
        return f"did you mean {' or '.join(repr(other) for other in ratios if ratios[other] == best)}?"
    return f"{suggest(path, sorted(siblings))}."


def _similarity(name: str, path: str) -> float:
    return difflib.SequenceMatcher(None, name, path.rpartition(".")[2]).ratio()
