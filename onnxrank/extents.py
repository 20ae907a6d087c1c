"""Symbolic extents: integer expressions over the symbols of a model's inputs, in a canonical form.

An extent is a Python `int` or an `Expr`: a polynomial with integer coefficients over atoms, where an atom is a symbol
(an extent of an input, at least 0 and otherwise unbounded) or a `Call` of `min`, `max`, `//` or `%`. Two extents that
are written differently but are equal as polynomials are equal as Python values, so a Reshape back and forth gives the
extent it started from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from math import gcd, inf, prod

Term = tuple[tuple["str | Call", ...], int]
"""A monomial, as a sorted tuple of atoms, and its coefficient."""


class Unproved(Exception):
    """An extent that no expression of this module gives."""


@dataclass(frozen=True)
class Call:
    """A function of extents that is no polynomial.

    Attributes:
        op: `min`, `max`, `//` (rounding down) or `%` (of the sign of the divisor).
        args: Its operands; those of `min` and `max` are sorted.
    """

    op: str
    args: tuple[int | Expr, ...]

    def __str__(self) -> str:
        if self.op in ("min", "max"):
            return f"{self.op}({', '.join(map(str, self.args))})"
        return "(" + f" {self.op} ".join(f"({a})" if isinstance(a, Expr) else str(a) for a in self.args) + ")"

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Least and largest value over all values of the symbols."""
        found = [bounds(a) for a in self.args]
        if self.op == "min":
            return min(b[0] for b in found), min(b[1] for b in found)
        if self.op == "max":
            return max(b[0] for b in found), max(b[1] for b in found)
        divisor = self.args[1]
        if not isinstance(divisor, int):
            return (0, found[0][1]) if self.op == "//" and found[0][0] >= 0 and found[1][0] >= 0 else (-inf, inf)
        if self.op == "%":
            return 0, divisor - 1
        low, high = found[0]
        return low if low == -inf else low // divisor, high if high == inf else high // divisor

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The value for values of all symbols."""
        found = [evaluate(a, values) for a in self.args]
        if self.op == "min":
            return min(found)
        if self.op == "max":
            return max(found)
        return found[0] // found[1] if self.op == "//" else found[0] % found[1]


def _order(atom: str | Call) -> tuple[int, str]:
    return isinstance(atom, Call), str(atom)


@dataclass(frozen=True)
class Expr:
    """A polynomial that is not constant.

    Attributes:
        terms: Monomials, each a sorted tuple of atoms, with their coefficients; sorted, none of them 0.
    """

    terms: tuple[Term, ...]

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: int | Expr) -> int | Expr:
        return _total([*self.terms, *_terms(other)])

    __radd__ = __add__

    def __neg__(self) -> int | Expr:
        return self * -1

    def __sub__(self, other: int | Expr) -> int | Expr:
        return _total([*self.terms, *((m, -c) for m, c in _terms(other))])

    def __rsub__(self, other: int | Expr) -> int | Expr:
        return _total([*_terms(other), *((m, -c) for m, c in self.terms)])

    def __mul__(self, other: int | Expr) -> int | Expr:
        return _total([(tuple(sorted(m + n, key=_order)), c * d) for m, c in self.terms for n, d in _terms(other)])

    __rmul__ = __mul__

    def __bool__(self) -> bool:
        raise Unproved(f"whether {self} is 0")

    def __str__(self) -> str:
        out = ""
        for atoms, c in self.terms:
            factors = [*([str(abs(c))] if abs(c) != 1 or not atoms else []), *map(str, atoms)]
            sign = " - " if c < 0 else " + "
            out += (sign if out else "-" if c < 0 else "") + "*".join(factors)
        return out

    __repr__ = __str__

    @cached_property
    def symbols(self) -> frozenset[str]:
        """The symbols that occur."""
        found: set[str] = set()
        for atoms, _ in self.terms:
            for a in atoms:
                found |= {a} if isinstance(a, str) else {s for x in a.args for s in symbols_of(x)}
        return frozenset(found)


def symbol(name: str) -> Expr:
    """The extent that is one symbol."""
    return Expr((((name,), 1),))


def symbols_of(size: int | Expr) -> frozenset[str]:
    """The symbols of an extent."""
    return size.symbols if isinstance(size, Expr) else frozenset()


def _terms(size: int | Expr) -> tuple[Term, ...]:
    if isinstance(size, Expr):
        return size.terms
    return (((), int(size)),) if size else ()


def _total(terms: Iterable[Term]) -> int | Expr:
    """The canonical form of a sum."""
    found: dict[tuple[str | Call, ...], int] = {}
    for atoms, c in terms:
        found[atoms] = found.get(atoms, 0) + c
    kept = [(m, c) for m, c in found.items() if c]
    if not kept:
        return 0
    if len(kept) == 1 and kept[0][0] == ():
        return kept[0][1]
    return Expr(tuple(sorted(kept, key=lambda t: ([_order(a) for a in t[0]] == [], [_order(a) for a in t[0]]))))


def evaluate(size: int | Expr, values: Mapping[str, int]) -> int:
    """The value of an extent for values of all its symbols.

    Raises:
        KeyError: A symbol has no value.
    """
    if not isinstance(size, Expr):
        return int(size)
    total = 0
    for atoms, c in size.terms:
        for a in atoms:
            c *= values[a] if isinstance(a, str) else a.evaluate(values)
        total += c
    return total


def replaced(size: int | Expr, values: Mapping[str | Call, int | Expr]) -> int | Expr:
    """An extent with others in the place of some symbols, or functions of them.

    Raises:
        Unproved: No expression of this module gives it.
    """
    out: int | Expr = 0
    for atoms, c in _terms(size):
        out = out + product([c, *(values[a] if a in values else _called(a, values) for a in atoms)])
    return out


def _called(atom: str | Call, values: Mapping[str | Call, int | Expr]) -> int | Expr:
    """A symbol, or a function of extents in which others are in the place of some symbols."""
    if isinstance(atom, str):
        return symbol(atom)
    args = [replaced(a, values) for a in atom.args]
    return reduce({"min": minimum, "max": maximum, "//": floor_divide, "%": modulo}[atom.op], args)


def calls(size: int | Expr, op: str) -> list[Call]:
    """The calls of a function that an extent is made of, not those within others."""
    return [a for atoms, _ in _terms(size) for a in atoms if isinstance(a, Call) and a.op == op]


def _calls_within(size: int | Expr, op: str) -> list[Call]:
    """The calls of a function that an extent is made of, and those within the arguments of others."""
    made = (a for atoms, _ in _terms(size) for a in atoms if isinstance(a, Call))
    return [c for a in made for c in ([a] if a.op == op else []) + [d for e in a.args for d in _calls_within(e, op)]]


def within(size: int | Expr, most: Mapping[str, int]) -> int | Expr:
    """An extent where some symbols are at most a number: without `min(s, c)` that is always `s` then."""
    found: dict[str | Call, int | Expr] = {}
    for call in _calls_within(size, "min"):
        *others, last = call.args
        if len(others) == 1 and isinstance(last, int) and _most(others[0], most) <= last:
            found[call] = others[0]
    try:
        return replaced(size, found) if found else size
    except Unproved:
        return size


def _most(size: int | Expr, most: Mapping[str, int]) -> float:
    """No less than the largest value of an extent where symbols are at most some numbers."""
    out: float = 0
    for atoms, c in _terms(size):
        if any(isinstance(a, Call) or a not in most for a in atoms):
            return inf
        out += c * prod(most[a] for a in atoms if isinstance(a, str)) if c > 0 or not atoms else 0
    return out


def least_where(size: int | Expr, number: int) -> dict[str, int]:
    """How large symbols are at least wherever `times * min(s + a, b) + c` is a number, as far as that follows.

    Args:
        size: The extent.
        number: The number.
    """
    call, times, added = _only_call(size)
    if call is None or call.op != "min" or (number - added) % times:
        return {}
    found = {}
    for arg in call.args:
        name, a = _shifted(arg)
        if name is not None:
            found[name] = (number - added) // times - a
    return found


def most_where(size: int | Expr, whole: int | Expr) -> dict[str, int]:
    """How large a symbol is at most wherever `min(s + a, b)`, with b no 1, fits `s + a` in broadcasting."""
    name, added = _shifted(whole)
    if name is None or not is_cut_of(size, whole):
        return {}
    cut = min(n for n in _operands("min", size) if isinstance(n, int))
    return {name: cut - added} if cut > 1 else {}


def _only_call(size: int | Expr) -> tuple[Call | None, int, int]:
    """An extent as a number of times a function of extents, and what is added to that."""
    terms = dict(_terms(size))
    added = terms.pop((), 0)
    ((atoms, times), *more) = terms.items() or [((), 1)]
    only = atoms[0] if len(atoms) == 1 and not more else None
    return (only if isinstance(only, Call) else None), times, added


def _shifted(size: int | Expr) -> tuple[str | None, int]:
    """An extent as a symbol, and what is added to that; None for others."""
    terms = dict(_terms(size))
    added = terms.pop((), 0)
    names = [atoms[0] for atoms, c in terms.items() if c == 1 and len(atoms) == 1]
    only = names[0] if len(names) == len(terms) == 1 else None
    return (only if isinstance(only, str) else None), added


def bounds(size: int | Expr) -> tuple[float, float]:
    """Least and largest value over all values of the symbols, which are at least 0."""
    if not isinstance(size, Expr):
        return size, size
    low: float = 0
    high: float = 0
    for atoms, c in size.terms:
        least: float = 1
        most: float = 1
        for a in atoms:
            a_low, a_high = (0, inf) if isinstance(a, str) else a.bounds
            if a_low < 0:
                return -inf, inf
            least, most = least * a_low, 0 if 0 in (most, a_high) else most * a_high
        ends = (c * least, c * most if most else 0)
        low, high = low + min(ends), high + max(ends)
    return low, high


def minimum(a: int | Expr, b: int | Expr) -> int | Expr:
    """The smaller of two extents."""
    return _extreme("min", a, b)


def maximum(a: int | Expr, b: int | Expr) -> int | Expr:
    """The larger of two extents."""
    return _extreme("max", a, b)


def _extreme(op: str, a: int | Expr, b: int | Expr) -> int | Expr:
    a, b = _without_less(a), _without_less(b)
    low, high = bounds(a - b)
    if high <= 0:
        return a if op == "min" else b
    if low >= 0:
        return b if op == "min" else a
    args: dict[int | Expr, None] = {}
    for x in (a, b):
        args |= dict.fromkeys(_operands(op, x))
    kept: list[int | Expr] = []
    for x in args:  # without those that another one is never behind
        sign = 1 if op == "min" else -1
        if not any(bounds((y - x) * sign)[1] <= 0 for y in kept):
            kept = [y for y in kept if bounds((x - y) * sign)[1] > 0] + [x]
    ordered = sorted(kept, key=lambda x: (isinstance(x, int), str(x)))
    return ordered[0] if len(ordered) == 1 else Expr((((Call(op, tuple(ordered)),), 1),))


def _without_less(size: int | Expr) -> int | Expr:
    """`n - max(a, b)` as `min(n - a, n - b)`, and the other way round, which what a slice leaves is made of."""
    terms = size.terms if isinstance(size, Expr) else ()
    less = [a for atoms, c in terms if c == -1 and len(atoms) == 1 for a in atoms if isinstance(a, Call)]
    if len(less) != 1 or less[0].op not in ("min", "max"):
        return size
    rest = _total(t for t in terms if t != ((less[0],), -1))
    other = minimum if less[0].op == "max" else maximum
    return reduce(other, (rest - a for a in less[0].args))


def is_cut_of(size: int | Expr, whole: int | Expr) -> bool:
    """Whether an extent is another one, cut to some constants of at least 1: `min(whole, c)`.

    Where numpy's broadcasting allows both beside each other, they are equal: a tensor cut to fewer entries, but for 1,
    does not fit, and one that is cut to a single entry is broadcast to the whole.
    """
    args = _operands("min", size)
    others = [a for a in args if a != whole]
    return 0 < len(others) < len(args) and all(isinstance(a, int) and a >= 1 for a in others)


def _operands(op: str, size: int | Expr) -> tuple[int | Expr, ...]:
    """The operands of an extent that is a call of a function itself."""
    if isinstance(size, Expr) and len(size.terms) == 1:
        (atoms, c) = size.terms[0]
        if c == 1 and len(atoms) == 1 and isinstance(atoms[0], Call) and atoms[0].op == op:
            return atoms[0].args
    return (size,)


def floor_divide(a: int | Expr, b: int | Expr) -> int | Expr:
    """`a // b`, rounding down.

    Raises:
        Unproved: The divisor may be negative, or is 0.
    """
    if not isinstance(b, int):
        exact = divide(a, b)
        if exact is not None:
            return exact
        if bounds(b)[0] < 0 or bounds(a)[0] < 0:
            raise Unproved(f"({a}) // ({b})")
        return Expr((((Call("//", (a, b)),), 1),))
    if b <= 0:
        raise Unproved(f"({a}) // {b}")
    if not isinstance(a, Expr):
        return a // b
    # What the divisor divides comes out of the quotient, whatever the sign of the rest.
    whole = _total((m, c // b) for m, c in a.terms if c % b == 0)
    rest = _total((m, c) for m, c in a.terms if c % b)
    if not isinstance(rest, Expr):
        return whole + rest // b
    return whole + Expr((((Call("//", (rest, b)),), 1),))


def ceil_divide(a: int | Expr, b: int) -> int | Expr:
    """`a / b`, rounded up."""
    return floor_divide(a + (b - 1), b)


def modulo(a: int | Expr, b: int | Expr) -> int | Expr:
    """`a % b`, of the sign of the divisor.

    Raises:
        Unproved: The divisor is not a positive constant.
    """
    if not isinstance(b, int) or b <= 0:
        raise Unproved(f"({a}) % ({b})")
    rest = _total((m, c) for m, c in _terms(a) if c % b)
    if not isinstance(rest, Expr):
        return rest % b
    return Expr((((Call("%", (rest, b)),), 1),))


def divide(a: int | Expr, b: int | Expr) -> int | Expr | None:
    """The quotient of a division without rest; None where there is none.

    It holds wherever the divisor is not 0.
    """
    if not isinstance(b, Expr):
        if b == 0 or any(c % b for _, c in _terms(a)):
            return None
        return _total((m, c // b) for m, c in _terms(a))
    lead, factor = b.terms[0]
    quotient: list[Term] = []
    rest = a
    for _ in range(64):
        if not isinstance(rest, Expr):
            return _total(quotient) if rest == 0 else None
        step = next((q for q in (_monomial_quotient(t, (lead, factor)) for t in rest.terms) if q is not None), None)
        if step is None:
            return None
        quotient.append(step)
        rest = rest - b * _total([step])
    return None


def _monomial_quotient(a: Term, b: Term) -> Term | None:
    """The quotient of two monomials; None where one does not divide the other."""
    left = list(a[0])
    for atom in b[0]:
        if atom not in left:
            return None
        left.remove(atom)
    return None if a[1] % b[1] else (tuple(left), a[1] // b[1])


def product(sizes: Iterable[int | Expr]) -> int | Expr:
    """The product of extents."""
    out: int | Expr = 1
    for n in sizes:
        out = out * n
    return out


def factors(size: int | Expr) -> tuple[int, tuple[str | Expr, ...]]:
    """An extent as a constant times symbols, and times what is left where it is no such product.

    Returns:
        The constant, and the further factors: names of symbols, and at most one `Expr` that has no such factor itself.
    """
    if not isinstance(size, Expr):
        return size, ()
    common = reduce(gcd, (c for _, c in size.terms))
    shared = list(size.terms[0][0])
    for atoms, _ in size.terms[1:]:
        shared = list((Counter(shared) & Counter(atoms)).elements())
    out: list[str | Expr] = [a if isinstance(a, str) else Expr((((a,), 1),)) for a in shared]
    rest = []
    for atoms, c in size.terms:
        kept = list(atoms)
        for a in shared:
            kept.remove(a)
        rest.append((tuple(kept), c // common))
    primitive = _total(rest)
    if isinstance(primitive, Expr):
        out.append(primitive)
    elif primitive != 1:
        common *= primitive
    return common, tuple(out)
