"""Settings are fields of dataclasses: type, default, range and legal names stand in one line, the meaning behind it.

In: a section as a plain mapping, and the dataclass that describes it. Out: the section with every value as its field
declares it, or one `ConfigError` that names the key, what it may be and what came. The dataclasses are also OmegaConf
structured configs (`laid_over`): their defaults lie under every file.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_lstp.errors import ConfigError, shortened, unknown_name

BOOLEAN, INTEGER, NUMBER, TEXT = "true or false", "a whole number", "a number", "text"
LIST, TEXTS, MAPPING, ANY = "a list", "text or a list of texts", "a mapping", ""

LARGEST = 2**63 - 1
"""No number of a configuration may be larger: torch and NumPy take no others."""
SEED = 2**62
"""The largest seed; ranks and epochs are added to it."""


def key(default: Any = None, **rule: Any) -> Any:
    """A field of a settings class.

    Args:
        default: a value, or the dataclass of a section.
        rule: any of `least`, `above`, `most`, `below`: limits of a number, or of each in a list; one inside is given by
            Annotated[int, ("least", 0)]. `one_of`: the texts it may be; `called`: what an error calls it. `word`: a
            text that is legal in place of a number (int | str) or of true and false (bool | str). `keys`: the settings
            class that a mapping's values are checked by, `open`: that class does not know all keys. `kind`: for a
            field of type Any. `per_split`: {split: value} is legal, too. `only`: tasks or runners that read the key.
    """
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=rule)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=functools.partial(copy.deepcopy, default), metadata=rule)
    return dataclasses.field(default=default, metadata=rule)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Rule for a value: its kind, whether it may be null, the rule of its items, and `key`'s arguments."""

    kind: str
    nullable: bool
    section: type | None = None
    item: Rule | None = None
    items: tuple[Rule, ...] = ()
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def expected(self) -> str:
        """The range, for an error: `a number above 0 and at most 1`."""
        words = {"least": "of at least", "above": "above", "most": "at most", "below": "below"}
        found = {name: self.limits[name] for name in words if name in self.limits}
        said = " and".join(f" {words[name]} {value}" for name, value in found.items())
        word = f" or {self.limits['word']}" if "word" in self.limits else ""
        optional = " or null" if self.nullable and self.kind in (INTEGER, NUMBER) else ""
        if self.kind == LIST and not self.is_of_texts:
            inside = [rule.expected for rule in self.items] or [self.item.expected, "..."]
            return f"a list [{', '.join(inside)}]"
        return f"{self.kind}{said}{word}{optional}"

    @property
    def is_of_texts(self) -> bool:
        """Return True for a text, and for a list of texts."""
        return self.kind in (TEXT, TEXTS) or (self.kind == LIST and self.item is not None and self.item.kind == TEXT)

    def checked(self, value: Any, where: str) -> Any:
        """`value` as its field declares it.

        Raises:
            ConfigError: it is of another kind, out of range, or not a known name.
        """
        if isinstance(value, str) and "${" in value:  # what it stands for is checked when it is known
            return value
        if value is None:
            if self.nullable or self.kind == ANY:
                return None
            raise ConfigError(f"{where} must be {self.expected}, got null")
        if self.limits.get("per_split") and isinstance(value, Mapping):
            alone = dataclasses.replace(self, limits={**self.limits, "per_split": False})
            return {split: alone.checked(one, f"{where}.{split}") for split, one in value.items()}
        if self.kind == ANY:
            return value
        if self.kind in (INTEGER, NUMBER):
            return value if value == self.limits.get("word", self) else self._number(value, where)
        if self.kind == MAPPING:
            return self._mapping(value, where)
        if self.kind == LIST or (self.kind == TEXTS and isinstance(value, list)):
            return self._list(value, where)
        if self.kind == BOOLEAN:
            if not isinstance(value, bool) and value != self.limits.get("word", self):
                raise self._wrong(value, where)
            return value
        if isinstance(value, (Mapping, list)):
            raise self._wrong(value, where)
        return self._text(value, where)

    def _wrong(self, value: Any, where: str) -> ConfigError:
        return ConfigError(f"{where} must be {self.expected}, got {reprlib.repr(value)}")

    def _list(self, value: Any, where: str) -> list:
        wrong = self._wrong(value, where)
        if isinstance(value, tuple):  # of a call in Python
            value = list(value)
        if not isinstance(value, list):
            kind = self.item.kind if self.item else None
            alone = kind == TEXT and isinstance(value, str) and not value.lstrip().startswith(("[", "{"))
            alone = alone or (kind in (INTEGER, NUMBER) and as_number(value) is not None)
            alone = alone and not where.endswith("]")  # [3] inside a list of lists is what somebody wrote
            raise ConfigError(f"{wrong}; write [{shortened(value)}]") if alone else wrong
        is_empty = not (value or self.is_of_texts or self.nullable)
        if is_empty or (self.items and len(value) != len(self.items)):
            raise wrong
        if self.kind == TEXTS:
            return [self._text(one, f"{where}[{place}]") for place, one in enumerate(value)]
        inside = self.items or (self.item,) * len(value)
        return [
            rule.checked(one, f"{where}[{place}]") for place, (rule, one) in enumerate(zip(inside, value, strict=True))
        ]

    def _number(self, value: Any, where: str) -> int | float:
        found = as_number(value)
        if found is None or (self.kind == INTEGER and found != int(found)):
            raise self._wrong(value, where)
        limits = self.limits
        if abs(found) > LARGEST and "most" not in limits:
            raise ConfigError(f"{where} must be {self.expected}, no larger than 2**63 - 1, got {reprlib.repr(value)}")
        inside = (
            abs(found) <= LARGEST
            and not (found < limits.get("least", found))
            and not (found > limits.get("most", found))
            and ("above" not in limits or found > limits["above"])
            and ("below" not in limits or found < limits["below"])
        )
        if not inside:
            raise self._wrong(value, where)
        return int(found) if self.kind == INTEGER else found

    def _text(self, value: Any, where: str) -> str:
        if isinstance(value, (Mapping, list)) or value is None:
            raise ConfigError(f"{where} must be {TEXT}, got {reprlib.repr(value)}")
        text = str(value)
        if "\0" in text or not text.isascii() and not _is_unicode(text):
            raise ConfigError(f"{where} must be {TEXT} without null bytes and broken characters, got {text!r}")
        names = self.limits.get("one_of")
        if names and text not in names:
            called = self.limits.get("called")
            raise ConfigError(unknown_name(called or where, text, names) + (f" ({where})" if called else ""))
        return text

    def _mapping(self, value: Any, where: str) -> dict:
        if not isinstance(value, Mapping):
            raise self._wrong(value, where)
        if self.section:
            return checked(value, self.section, where)
        inside = self.limits.get("keys")
        if inside:
            return checked(value, inside, where, open=self.limits.get("open", False))
        if self.item is None:
            return dict(value)
        return {name: self.item.checked(one, f"{where}.{name}") for name, one in value.items()}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_number(value: Any) -> int | float | None:
    """A finite number, also one written as text (YAML calls 1e-4 text); None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, int):
        return value
    try:
        found = int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else float(value)
    except ValueError:
        return None
    return found if isinstance(found, int) or math.isfinite(found) else None


@functools.cache
def rules(settings: type) -> dict[str, Rule]:
    """The rule of each field of a settings class."""
    hints = typing.get_type_hints(settings, include_extras=True)
    return {field.name: _rule(hints[field.name], field.metadata) for field in dataclasses.fields(settings)}


def _rule(hint: Any, limits: Mapping[str, Any]) -> Rule:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [one for one in (typing.get_args(hint) if union else (hint,)) if one is not type(None)]
    nullable = union and type(None) in typing.get_args(hint)
    if set(kinds) in ({int, float}, {int, float, str}):
        return Rule(NUMBER, nullable, limits=limits)
    if set(kinds) == {int, str}:
        return Rule(INTEGER, nullable, limits=limits)
    if set(kinds) == {bool, str}:
        return Rule(BOOLEAN, nullable, limits=limits)
    (kind,) = kinds
    if kind is Any:
        return Rule(limits.get("kind", ANY), True, limits=limits)
    if dataclasses.is_dataclass(kind):
        return Rule(MAPPING, nullable, section=kind, limits=limits)
    origin = typing.get_origin(kind) or kind
    if origin is typing.Annotated:
        inside, *more = typing.get_args(kind)
        return dataclasses.replace(_rule(inside, {**limits, **dict(more)}), nullable=nullable)
    if origin is tuple:
        return Rule(LIST, nullable, items=tuple(_rule(one, {}) for one in typing.get_args(kind)), limits=limits)
    if origin is list:
        return Rule(LIST, nullable, item=_rule((typing.get_args(kind) or (str,))[0], limits), limits=limits)
    if origin is dict:
        inside = (typing.get_args(kind) or (str, Any))[1]
        return Rule(
            MAPPING, nullable, item=_rule(inside, {} if dataclasses.is_dataclass(inside) else limits), limits=limits
        )
    return Rule({bool: BOOLEAN, int: INTEGER, float: NUMBER, str: TEXT}[origin], nullable, limits=limits)


def checked(
    given: Mapping, settings: type, where: str, extra: Iterable[str] = (), *, open: bool = False
) -> dict[str, Any]:
    """`given` with every value as its field declares it.

    Args:
        where: what errors call the section, such as "datasets.lstp_shapes.shards".
        extra: keys that are legal beside the fields; their values are not looked at.
        open: any other key is legal, too.

    Raises:
        ConfigError: a key that nobody knows, or a value that cannot be used.
    """
    known, found = rules(settings), {}
    for name, value in given.items():
        if name in known:
            found[name] = known[name].checked(value, f"{where}.{name}")
        elif open or name in extra:
            found[name] = value
        else:
            raise ConfigError(unknown_key(where, name, {*known, *extra}))
    return found


def laid_over(settings: type, *sections: Any) -> DictConfig:
    """The sections, each laid over those before it and all over the defaults; keys that are no fields are kept."""
    return OmegaConf.merge(_defaults(settings), *sections)  # which copies the first


@functools.cache
def _defaults(settings: type) -> DictConfig:
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(settings)))


SAMPLING = {
    **{"temperature": 1.0, "top_h": None, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0},
    **{"epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
}
"""Settings of generation that shape what tokens are drawn from, and the value that changes nothing; in the order of
transformers."""


LEAST_TEMPERATURE = 1e-20
"""Scores of tokens are divided by it, and are no numbers any more where they pass 3e38."""


def check_generation(given: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError for settings of generation that contradict each other.

    Args:
        given: all that are in force, named as in transformers.
        where: what errors call their section; names: what they call single ones of another section.
    """
    called = {name: f"{where}.{name}" for name in given} | (names or {})
    heat = given.get("temperature")
    if given.get("do_sample") and heat is not None and heat < LEAST_TEMPERATURE:
        least = f"must be at least {LEAST_TEMPERATURE:g} where do_sample is true"
        raise ConfigError(f"{called['temperature']} {least}, got {heat:g}; do_sample=false gives the likeliest answer")
    for name, neutral in SAMPLING.items():  # 0 asks for nothing, or, as a temperature, for the greedy answer
        if given.get(name) and given[name] != neutral and not given.get("do_sample"):
            raise ConfigError(
                f"{called[name]}={given[name]!r} shapes what tokens are drawn from, and none are drawn (do_sample is "
                "false); set model.generation.do_sample=true, or leave it out"
            )
    least, most = given.get("min_new_tokens") or 0, given.get("max_new_tokens")
    if most is not None and least > most:
        least_name, most_name = called["min_new_tokens"], called["max_new_tokens"].rpartition(".")[2]
        raise ConfigError(f"{least_name} must be at most {most_name} ({most}), got {least}")


def generation_over(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `given` over a model's own settings of generation, less those of sampling where it turns that off."""
    greedy = "do_sample" in given and not given["do_sample"]
    return {**{name: value for name, value in own.items() if not (greedy and name in SAMPLING)}, **given}


def reason(error: Exception) -> str:
    """An error of another package in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nearest(name: str, known: Iterable[object], cutoff: float = 0.5) -> str | None:
    return next(iter(difflib.get_close_matches(name, map(str, known), n=1, cutoff=cutoff)), None)


def unknown_key(where: str, name: object, known: Iterable[object]) -> str:
    name = shortened(name)
    near = nearest(name, known)
    if near:
        return f"unknown key '{where}.{name}'; did you mean '{where}.{near}'?"
    return f"unknown key '{where}.{name}'; known: {', '.join(sorted(map(str, known)))}"
