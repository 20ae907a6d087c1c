"""Which rules there are: onnxrank's own, those of installed packages, those of files."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata

from onnxrank.errors import UsageError
from onnxrank.rule import Rule


def choose_rules(
    select: Sequence[str] | None, ignore: Sequence[str], extra: Sequence[str | os.PathLike[str]]
) -> tuple[Rule, ...]:
    """The rules to use: onnxrank's own, those of installed packages (entry points `onnxrank.rules`), those of files.

    Raises:
        UsageError: A name is not that of a rule, or a file cannot be used.
    """
    from onnxrank.rules import RULES

    found: list[Rule] = []
    for path in extra:
        found += _rules_in(path)
    for point in _points(metadata.entry_points, tuple(sys.path)):
        found += _rules_of(point)
    found += RULES
    names = {r.name for r in found}
    for name in [*(select or ()), *ignore]:
        if name not in names:
            raise UsageError(f"there is no rule {name!r}; the rules are {', '.join(sorted(names))}")
    # Without the movement rule nothing can be followed, so it is not up for selection.
    wanted = names if select is None else {*select, "movement", "broadcast"}
    return tuple(r for r in found if r.name in wanted and (r.name not in ignore or r.name == "movement"))


@functools.lru_cache(maxsize=8)
def _points(
    find: Callable[..., Iterable[metadata.EntryPoint]], path: tuple[str, ...]
) -> tuple[metadata.EntryPoint, ...]:
    """The entry points of rules: looking for them reads a file of every installed package.

    Args:
        find: Finds them.
        path: Where it looks.
    """
    return tuple(find(group="onnxrank.rules"))


def _rules_in(path: str | os.PathLike[str]) -> list[Rule]:
    import runpy

    where = f"the rules file {os.fspath(path)}"
    try:
        space = runpy.run_path(os.fspath(path))
    except OSError as e:
        raise UsageError(f"{where} cannot be read: {e.strerror}") from e
    except (Exception, SystemExit) as e:
        raise UsageError(f"{where} fails: {_told(e)}") from e
    return _checked(space.get("RULES"), f"{where} must define RULES, a sequence of onnxrank.Rule")


def _rules_of(point: metadata.EntryPoint) -> list[Rule]:
    """The rules of an installed package."""
    where = f"the entry point {point.name!r} of {point.dist.name if point.dist else point.value}"
    try:
        found = point.load()
    except (Exception, SystemExit) as e:
        raise UsageError(f"{where} fails: {_told(e)}; uninstall or mend the package") from e
    return _checked(found, f"{where} must name a sequence of onnxrank.Rule, and is {point.value!r}")


def _checked(found: object, must: str) -> list[Rule]:
    if not isinstance(found, Sequence) or not all(isinstance(r, Rule) for r in found):
        raise UsageError(must)
    return list(found)


def _told(e: BaseException) -> str:
    """An error of somebody else's code, and where names went that were onnxrank's once."""
    ours = any(name in str(e) for name in ("onnxrank", "Rule."))
    gone = ours and isinstance(e, (ImportError, AttributeError, TypeError))
    hint = "; CHANGELOG.md lists the names that have changed, old and new" if gone else ""
    return f"{type(e).__name__}: {e}{hint}"
