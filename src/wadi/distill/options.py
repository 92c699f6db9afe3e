"""How an option of a distillation is declared: once, with its type, its range and its name as a flag.

A group of options is a frozen dataclass that inherits `Options`; a group may hold other groups.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from wadi.errors import WadiError

Group = TypeVar("Group", bound="Options")


def option(
    default: Any,
    flag: str = "",
    *,
    often: bool = False,
    changeable: bool = False,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> Any:
    """Declare an option.

    Args:
        default: its value where nobody gives another.
        flag: its name on the command line, without dashes, where it differs from the field's.
        often: whether `wadi distill --help` shows it; `--help-all` shows every option.
        changeable: whether it may differ when a run is resumed.
        at_least: smallest value of a number, or of each number of a tuple.
        above: a number must be greater than this.
        at_most: largest value of a number.
        below: a number must be smaller than this.
    """
    bounds = (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
    marks = {"flag": flag, "often": often, "changeable": changeable, "bounds": bounds}
    return dataclasses.field(default=default, metadata=marks)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an option stands.

    Attributes:
        name: its flag with underscores, such as "student_rank"; no two options have the same.
        path: names of the groups and of the field, such as ("student", "rank").
        hint: its type.
        field: as `option` declared it.
        group: the class that declares it, whose docstrings tell what it is.
    """

    name: str
    path: tuple[str, ...]
    hint: Any
    field: dataclasses.Field
    group: type[Options]


@dataclasses.dataclass(frozen=True)
class Options:
    """A group of options, which are checked when it is made.

    Raises:
        WadiError: a value is of the wrong type or outside its range; the message names the option.
    """

    def __post_init__(self) -> None:
        for place in _own_options(type(self)):
            value = _typed(place.name, getattr(self, place.field.name), place.hint)
            _check_bounds(place, value)
            object.__setattr__(self, place.field.name, value)

    @classmethod
    def places(cls) -> dict[str, Place]:
        """Every option of this group and of the groups in it, by the name of its flag.

        Raises:
            TypeError: two options have the same flag.
        """
        found = list(_walk(cls))
        places = {place.name: place for place in found}
        if len(places) < len(found):
            double = [place for place in found if places[place.name] is not place]
            raise TypeError(f"{_flag(double[0].name)} is the flag of two options; give one another name")
        return places

    def values(self) -> dict[str, Any]:
        """The value of every option, by the name of its flag."""
        return {name: functools.reduce(getattr, p.path, self) for name, p in self.places().items()}

    def replace(self: Group, **options: Any) -> Group:
        """The same with other values: `config.replace(student_rank=64, max_train_steps=100)`.

        Raises:
            WadiError: an option that does not exist, or a bad value.
        """
        places = self.places()
        for name in options:
            if name not in places:
                raise WadiError(f"{_flag(name)}: no such option{did_you_mean(name, places)}")
        return _with(self, {places[name].path: value for name, value in options.items()})

    @classmethod
    def from_nested(cls: type[Group], values: Mapping[str, Any]) -> Group:
        """Make a group of values as they stand in a file: a mapping, with a mapping for each group in it.

        Raises:
            WadiError: an option that does not exist, or a bad value.
        """
        return cls().replace(**dict(_flat(cls, values)))


def did_you_mean(name: str, names: Mapping[str, Any]) -> str:
    """The end of a message about a name that is not known: the nearest one that is, if there is one."""
    near = get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


@functools.cache
def _own_options(kind: type[Options]) -> list[Place]:
    hints = get_type_hints(kind)
    return [
        Place(field.metadata["flag"] or field.name, (field.name,), hints[field.name], field, kind)
        for field in dataclasses.fields(kind)
        if "flag" in field.metadata
    ]


@functools.cache
def _groups(kind: type[Options]) -> dict[str, type[Options]]:
    own = {place.field.name for place in _own_options(kind)}
    return {name: hint for name, hint in get_type_hints(kind).items() if name not in own}


def _walk(kind: type[Options]) -> Iterator[Place]:
    yield from _own_options(kind)
    for name, group in _groups(kind).items():
        for place in _walk(group):
            yield dataclasses.replace(place, path=(name, *place.path))


def _with(group: Group, changes: Mapping[tuple[str, ...], Any]) -> Group:
    """A group with other values, by their paths in it."""
    own = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in {path[0] for path in changes if len(path) > 1}:
        inner = {path[1:]: value for path, value in changes.items() if path[0] == name}
        own[name] = _with(getattr(group, name), inner)
    return dataclasses.replace(group, **own)


def _flat(kind: type[Options], values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name of the flag and value of what a nested mapping holds."""
    options = {place.field.name: place.name for place in _own_options(kind)}
    groups = _groups(kind)
    for key, value in values.items():
        if key in options:
            yield options[key], value
        elif key not in groups:
            raise WadiError(f"unknown option {key!r}{did_you_mean(str(key), options | groups)}")
        elif not isinstance(value, Mapping):
            raise WadiError(f"{key}: is a group, so it must hold options as `name: value` lines")
        else:
            yield from _flat(groups[key], value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_bounds(place: Place, value: Any) -> None:
    tests = {
        "at least": lambda v, bound: v >= bound,
        "above": lambda v, bound: v > bound,
        "at most": lambda v, bound: v <= bound,
        "below": lambda v, bound: v < bound,
    }
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
    bounds = [(words, bound) for words, bound in place.field.metadata["bounds"] if math.isfinite(bound)]
    for number in numbers:
        if not (math.isfinite(number) and all(tests[words](number, bound) for words, bound in bounds)):
            rule = " and ".join(f"{words} {bound:g}" for words, bound in bounds) or "a finite number"
            raise WadiError(f"{_flag(place.name)}: must be {rule}, but is {value}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as `hint` has it: numbers that are whole pass as floats, and lists as tuples."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        choices = ", ".join(map(str, get_args(hint)))
        raise WadiError(f"{_flag(name)}: must be one of {choices}, but is {value!r}")
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(name, item, get_args(hint)[0]) for item in value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    kind = getattr(hint, "__name__", str(hint))
    raise WadiError(f"{_flag(name)}: must be a value of type {kind}, but is {value!r}")
