"""Configuration files and `--options`: where they are found, and how their text becomes values.

In: the words of a command line. Out: a DictConfig, not yet complete. YAML guesses what a word means: 12:30 is 750, yes
is true, 010 is 8, 20241127 a number. Here the settings say what a key holds, and a text or a path is taken letter by
letter, in files and in options; only `null`, `~` and nothing at all mean that there is no value. This module imports
neither torch nor LAVIS.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from lavis_lstp.config.data import CONFIGS as DATASETS
from lavis_lstp.config.data import VideoQA, benchmark_names, settings_of
from lavis_lstp.config.fields import LIST, TEXT, Rule, nearest, rules
from lavis_lstp.config.model import ModelSettings
from lavis_lstp.config.run import RunSettings
from lavis_lstp.errors import ConfigError, shortened, unknown_name
from lavis_lstp.files import expanded

PACKAGE = Path(__file__).resolve().parent.parent
SECTIONS = ("model", "datasets", "run")
NULL = ("", "~", "null")
DEEPEST = 50
"""Mappings and lists inside one another that a configuration may have."""


# ---- files -------------------------------------------------------------------------------------------------------


def find_config(path: str | os.PathLike) -> Path:
    """The file meant by `--cfg-path`: as given, else among the recipes of the package or its checkout, else LAVIS's.

    An evaluation, projects/lstp/eval/<benchmark>_<model>.yaml, is no file but composed of two; see `evaluation_parts`.

    Raises:
        ConfigError: it is nowhere; the message names the nearest recipe.
    """
    given = expanded(path)
    if "\0" in str(given):
        raise ConfigError(f"config {str(path)!r} is no file name")
    for root in (Path(), PACKAGE, PACKAGE.parent, *lavis_root()):
        if os.path.isfile(root / given) or evaluation_parts(root / given):
            return (root / given).resolve()
    if os.path.isdir(given):
        raise ConfigError(f"config '{path}' is a folder; expected a YAML file")
    raise ConfigError(unknown_name("config file", str(path), recipes()))


def lavis_root() -> list[Path]:
    """The folder that LAVIS lies in, whether or not it has been imported."""
    module = sys.modules.get("lavis")
    spec = module.__spec__ if module is not None else importlib.util.find_spec("lavis")
    return [Path(spec.origin).parent.parent] if spec is not None and spec.origin else []


def recipes() -> list[str]:
    """The configurations that `--cfg-path` finds without a checkout, such as projects/lstp/tiny_ft.yaml."""
    no_recipes = {name for part in ("chains", *EVALUATION_PARTS) for name in project_files(f"lstp/**/{part}/*.yaml")}
    files = [name for name in project_files("lstp/**/*.yaml") if name not in no_recipes]
    return sorted([*files, *evaluations()])


EVALUATION_PARTS = ("benchmarks", "models")
"""Folders beside which an evaluation may be asked for: what is asked, and who answers."""


def evaluations() -> list[str]:
    """projects/lstp/eval/<benchmark>_<model>.yaml, every pair."""
    models = [Path(name) for name in project_files("lstp/eval/models/*.yaml")]
    own = [Path(name).stem for name in project_files("lstp/eval/benchmarks/*.yaml")]
    names = sorted({*own, *(name.removeprefix("lstp_") for name in benchmark_names())})
    return [str(model.parent.parent / f"{name}_{model.name}") for name in names for model in models]


def evaluation_parts(path: Path) -> tuple[Path, Path] | None:
    """The two files that a path FOLDER/<benchmark>_<model>.yaml is composed of.

    FOLDER/benchmarks/<benchmark>.yaml, or else the data set's own file in configs/datasets where it has a section
    `run`, and FOLDER/models/<model>.yaml.
    """
    for i, letter in enumerate(path.stem):
        if letter == "_":
            names = path.stem[:i], path.stem[i + 1 :]
            parts = tuple(path.parent / p / (n + path.suffix) for p, n in zip(EVALUATION_PARTS, names, strict=True))
            if not os.path.isfile(parts[0]) and f"lstp_{names[0]}" in benchmark_names():
                parts = DATASETS / f"lstp_{names[0]}.yaml", parts[1]
            if all(os.path.isfile(part) for part in parts):
                return parts
    return None


def load_recipe(path: Path) -> DictConfig:
    """A file's content; of an evaluation, both its parts' and the folder for its output.

    `datasets: {"*": ...}` of the model's part goes to each data set of the benchmark's.
    """
    if path.is_file():
        return _load(path)
    parts = evaluation_parts(path)
    benchmark, model = map(_load, parts)
    if parts[0].parent == DATASETS:  # what it says of the data are their defaults anyway
        benchmark = OmegaConf.create({"datasets": {parts[0].stem: {}}, "run": benchmark.run})
    common = (model.pop("datasets", None) or {}).get("*") or {}
    for name, section in benchmark.datasets.items():
        benchmark.datasets[name] = OmegaConf.merge(section or {}, common)
    output = {"run": {"output_dir": f"output/lstp/eval/{path.stem}"}}
    return OmegaConf.merge(output, benchmark, model)


def project_files(pattern: str) -> list[str]:
    """Files of `projects/` in the package or its checkout, as a user names them."""
    roots = (PACKAGE, PACKAGE.parent)
    return sorted({str(file.relative_to(root)) for root in roots for file in (root / "projects").glob(pattern)})


def _load(path: Path) -> DictConfig:
    """A YAML file whose root is a mapping; each way to fail gives one line."""
    try:
        content = parse(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, list):
            raise ConfigError("expected the sections model, datasets and run, got a list")
        return OmegaConf.create(content if isinstance(content, dict) else {})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"not YAML: {where}{_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_line(error)) from error


# ---- options -----------------------------------------------------------------------------------------------------


def options_to_dotlist(options: Sequence[str] | None) -> list[str]:
    """`["a.b=1", "c.d", "2"]` -> `["a.b=1", "c.d=2"]`: both styles of LAVIS, mixed at will.

    Raises:
        ConfigError: a name without a value.
    """
    dotlist, rest = [], iter(options or [])
    for option in rest:
        if "=" not in option:
            if dotlist and dotlist[-1].endswith("=") and option.partition(".")[0] not in SECTIONS:
                raise ConfigError(_with_blanks(dotlist[-1].rstrip("="), option))
            value = next(rest, None)
            if value is not None and value.startswith("="):
                raise ConfigError(_with_blanks(option, value.lstrip("=") or next(rest, "VALUE")))
            if value is None:
                name, colon, given = option.partition(":")
                way = f"{name.strip()}={given.strip() or 'VALUE'}" if colon else f"{option}=VALUE"
                raise ConfigError(f"option '{option}' has no value; write --options {way}")
            option = f"{option}={value}"
        dotlist.append(option)
    return dotlist


def _with_blanks(name: str, value: str) -> str:
    return f"option '{shortened(name)}' has blanks around '='; write --options {shortened(name)}={shortened(value)}"


def with_options(config: DictConfig, options: Sequence[str] | None) -> DictConfig:
    """`config` with `--options` laid over it.

    Raises:
        ConfigError: an option that is not of the form A.B=C.
    """
    config = copy.deepcopy(config)
    for option in options_to_dotlist(options):
        name, _, value = option.partition("=")
        path = tuple(name.split("."))
        if not all(path) or len(path) > DEEPEST:
            raise ConfigError(f"cannot apply --options {shortened(option)}: expected SECTION.KEY=VALUE")
        try:
            found = option_value(value, path)
            for part in reversed(path):
                found = {part: found}
            place = _list_above(config, path)
            if place:
                raise ConfigError(
                    f"cannot apply --options {shortened(option)}: {place} is a list, which is set whole: "
                    f"--options '{place}=[...]'"
                )
            config.merge_with(found)  # OmegaConf.merge would copy all of it for each option
        except yaml.YAMLError as error:
            open_at = [bracket for bracket in "[{" if value.count(bracket) > value.count(PAIRS[bracket])]
            what = f"'{open_at[0]}' is not closed by '{PAIRS[open_at[0]]}'" if open_at else _problem(error)
            what += f"; {COMMENT}" if re.search(r"[\s\[{,]#", value) else ""
            raise ConfigError(f"cannot apply --options {shortened(option)}: not YAML ({what})") from error
        except (OmegaConfBaseException, TypeError) as error:
            raise ConfigError(f"cannot apply --options {shortened(option)}: {first_line(error)}") from error
    return config


PAIRS = {"[": "]", "{": "}"}
COMMENT = "'#' begins a comment in YAML; put a text with it in quotes"


def _list_above(config: DictConfig, path: Sequence[str]) -> str | None:
    """Return the list that `path` goes into, or a key that the settings say is one; None where there is none."""
    found: Any = config
    for count, part in enumerate(path[:-1], 1):
        found = found._get_node(part) if isinstance(found, DictConfig) else None
        rule = rule_at(tuple(path[:count]))
        if isinstance(found, ListConfig) or (rule is not None and rule.kind == LIST):
            return ".".join(path[:count])
    return None


def option_value(raw: str, path: tuple[str, ...]) -> Any:
    """The value that the text behind `=` stands for, at the key `path`."""
    rule = rule_at(path)
    if rule is None or not rule.is_of_texts:
        return parse(raw, path, option=True)
    begin = raw.lstrip()[:1]
    if begin in ("'", '"'):
        quoted = _quoted(raw)
        if quoted is not None:
            return quoted
    many = rule.kind != TEXT and begin == "[" or rule.limits.get("per_split") and begin == "{"
    if many or rule.kind == LIST:
        return parse(raw, path, option=True)
    return None if raw.strip() in NULL else raw


def _quoted(raw: str) -> str | None:
    """The text in YAML's quotes; None where the quotes are part of a longer text."""
    try:
        node = yaml.compose(raw, Loader=Loader)
    except yaml.YAMLError:
        return None
    return node.value if isinstance(node, yaml.ScalarNode) and node.style in ("'", '"') else None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"run": {"seed": 1}} -> {"run.seed": 1}, as options name keys; a list is a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def sections_of(user: DictConfig) -> dict[str, Any]:
    """The sections of a configuration as plain values, interpolations unresolved.

    Raises:
        ConfigError: a section is missing, no mapping, or known to nobody.
    """
    plain = OmegaConf.to_container(user, resolve=False)
    for name in plain:
        if name not in SECTIONS:
            near = nearest(str(name), SECTIONS)
            hint = f"did you mean '{near}'? " if near else ""
            raise ConfigError(f"unknown section '{name}'; {hint}known: {', '.join(SECTIONS)}")
    for section in SECTIONS:
        if plain.get(section) is None:
            raise ConfigError(f"section '{section}' is missing; expected the sections model, datasets and run")
        if not isinstance(plain[section], Mapping):
            raise ConfigError(f"section '{section}' must be a mapping, got {shortened(repr(plain[section]))}")
    for section, name in (("model", "arch"), ("model", "model_type"), ("run", "task"), ("run", "runner")):
        if not isinstance(plain[section].get(name), str | None):
            raise ConfigError(f"{section}.{name} must be {TEXT}, got {shortened(repr(plain[section][name]))}")
    for name, section in plain["datasets"].items():
        if not isinstance(section, Mapping | None):
            raise ConfigError(f"datasets.{name} must be a mapping, got {shortened(repr(section))}")
    return plain


# ---- YAML --------------------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """YAML whose numbers are those of Python and JSON: no base 60, no base 8, no dates; 1e-4 is a number."""


Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?
          |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$|^0x[0-9a-fA-F]+$"), list("-+0123456789")
)


def _integer(loader: Loader, node: yaml.ScalarNode) -> int | str:
    text = node.value.replace("_", "")
    if len(text) > 100:  # Python turns no endless digits into a number
        return text
    return int(text, 16) if text.startswith("0x") else int(text)


Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, path: tuple[str, ...] = (), *, option: bool = False) -> Any:
    """The value of a YAML text that stands at `path` of a configuration.

    Raises:
        yaml.YAMLError: it is no YAML.
        ConfigError: it has no end, or keys that are no words; an option has a comment, which nobody would read.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if option and text[node.end_mark.index if node else 0 :].strip():
            raise ConfigError(f"cannot apply --options {'.'.join(path)}={shortened(text)}: {COMMENT}")
        return None if node is None else _construct(loader, node, path)
    except RecursionError:
        raise ConfigError(f"nested more than {DEEPEST} levels deep") from None
    finally:
        loader.dispose()


def _construct(loader: Loader, node: yaml.Node, path: tuple[str, ...]) -> Any:
    if len(path) > DEEPEST:
        raise ConfigError(f"nested more than {DEEPEST} levels deep")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, one, (*path, "[]")) for one in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path)
    rule = rule_at(path)
    if rule is not None and rule.is_of_texts and node.tag != "tag:yaml.org,2002:binary":
        plain = node.style is None
        return None if plain and node.value in NULL else node.value
    try:
        return loader.construct_object(node, deep=True)
    except ValueError as error:
        raise ConfigError(f"{'.'.join(path)}: cannot read {node.value[:100]!r} ({error})") from error


def _mapping(loader: Loader, node: yaml.MappingNode, path: tuple[str, ...]) -> dict:
    own: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in own:
            raise yaml.constructor.ConstructorError(
                "while constructing a mapping", node.start_mark, f"found duplicate key {key.value}", key.start_mark
            )
        own.add(key.value if isinstance(key, yaml.ScalarNode) else "")
    if "<<" in own:
        loader.flatten_mapping(node)
    found = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                "while constructing a mapping", node.start_mark, "found a key that is no word", key.start_mark
            )
        found[key.value] = _construct(loader, value, (*path, key.value))
    return found


def rule_at(path: tuple[str, ...]) -> Rule | None:
    """The rule of the key at `path`; None where the settings have none."""
    section, *rest = path or ("",)
    settings = {"model": ModelSettings, "run": RunSettings}.get(section)
    if section == "datasets" and rest:
        name, *rest = rest
        settings = VideoQA if name == "*" else settings_of(name)
    if settings is None or not rest:
        return None
    rule = rules(settings).get(rest[0])
    for name in rest[1:]:
        if rule is None:
            return None
        inside = rule.section or rule.limits.get("keys")
        if inside is not None:
            rule = rules(inside).get(name)
        elif name != "[]" and not rule.limits.get("per_split"):
            rule = rule.item
    return rule


def _problem(error: yaml.YAMLError) -> str:
    """Return what is wrong in a YAML text; its first line tells only what was being read."""
    return getattr(error, "problem", None) or first_line(error)


def omegaconf_line(error: OmegaConfBaseException) -> str:
    """Return an error of OmegaConf in one line, with the key that it is about."""
    remedy = "; write \\${ where it is no interpolation" if isinstance(error, InterpolationResolutionError) else ""
    key = f"{error.full_key}: " if error.full_key else ""
    return f"{key}{first_line(error)}{remedy}"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
