"""What `inspect` found in a model: the data behind the tables, the page and the JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from onnxrank.report import LevelCost, Prediction

SCHEMA_VERSION = 1
"""Version of the JSON form; it changes when a field goes or changes its meaning, not when one is added."""

LEVELS = ("constant", "request", "mixed", "candidate")
"""Levels of tensors; `mixed` has entries of several."""


@dataclass(frozen=True)
class Block:
    """Part of a tensor along one axis that has one level.

    Attributes:
        axis: The axis.
        positions: Positions along it, as half-open ranges: `0:13,20`.
        level: `constant`, `request` or `candidate`; `unread` where nobody reads it.
    """

    axis: int
    positions: str
    level: str


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model.

    Attributes:
        name: Its name.
        dims: Its extents, `N` for candidates; empty where the shape is not known or it is a scalar.
        level: `constant`, `request`, `mixed` or `candidate`.
        once: Share of its entries, per row, that are the same for all candidates.
        blocks: Where entries of several levels follow an axis: which is which.
    """

    name: str
    dims: tuple[str, ...]
    level: str
    once: float
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class InputTensor:
    """One input of the model.

    Attributes:
        name: Its name.
        dtype: Element type.
        dims: Its extents, `N` for candidates.
        role: `request`, `candidate` or `mixed`.
        request: Request-level positions of a mixed input, as half-open ranges.
        gain: Share of the multiply-adds that would be saved beyond what is saved now if it were declared
            request-level as a whole; None where that was not tried.
    """

    name: str
    dtype: str
    dims: tuple[str, ...]
    role: str
    request: str = ""
    gain: float | None = None


@dataclass(frozen=True)
class Node:
    """One node, with what it costs per request.

    Attributes:
        name: Its name, or that of what it makes.
        op: Operator.
        scope: Layers it belongs to, divided by slashes.
        inputs: Tensors it reads.
        outputs: Tensors it makes.
        level: Level of what it makes: `constant`, `request`, `mixed` or `candidate`.
        rows: Whether it runs on the rows of all candidates.
        macs: Multiply-adds of matrix products.
        once: Of these, those that are the same for all candidates and so need not be made but once.
        bytes: Bytes it writes.
        parameters: Entries of the initializers that it is the first to read.
        saved: Multiply-adds that `optimize` saves here.
        rule: Rule that saves them, or that made the node; empty if none.
    """

    name: str
    op: str
    scope: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    level: str
    rows: bool
    macs: int
    once: int
    bytes: int
    parameters: int
    saved: int = 0
    rule: str = ""


@dataclass(frozen=True)
class Layer:
    """Costs of all nodes in a layer, inner layers included.

    Attributes:
        scope: Names of the nested layers, divided by slashes; empty for the whole model.
        nodes: Number of nodes.
        macs: Multiply-adds per request.
        once: Of these, those that need not be made but once.
        bytes: Bytes written per request.
        parameters: Entries of initializers.
        saved: Multiply-adds that `optimize` saves here.
    """

    scope: str
    nodes: int
    macs: int
    once: int
    bytes: int
    parameters: int
    saved: int


@dataclass(frozen=True)
class Ideal:
    """The block ideal: no product of two values that are the same for all candidates is made more than once.

    A rewrite that changes the order of products, as `fold` and `cross` do, can go below it.

    Attributes:
        once: Multiply-adds per request.
        each: Multiply-adds per candidate.
        macs: Both, at the expected number of candidates.
    """

    once: int
    each: int
    macs: int


@dataclass(frozen=True)
class Opportunity:
    """A place where a rule saves something.

    Attributes:
        rule: The rule.
        node: The original node.
        op: Its operator.
        scope: Its layer.
        macs: Multiply-adds saved per request.
        share: Of all that the model makes.
        seconds: Predicted time saved per request on one core.
    """

    rule: str
    node: str
    op: str
    scope: str
    macs: int
    share: float
    seconds: float


@dataclass(frozen=True)
class Refused:
    """Places that are left alone for one reason.

    Attributes:
        rule: The rule that looked at them, or could have done something there; `model` for the model as a whole.
        reason: Why.
        nodes: The nodes; none where it is not a matter of any.
        macs: Multiply-adds per request of these nodes.
        lost: Multiply-adds per request that are made for every candidate because of them and need be made but once; 0
            where there are none, or nothing is known of them.
        lift: What would let the rule take them, if anything is known; empty otherwise.
    """

    rule: str
    reason: str
    nodes: tuple[str, ...]
    macs: int
    lost: int
    lift: str


@dataclass(frozen=True)
class Table:
    """An embedding table.

    Attributes:
        name: The initializer.
        rows: Number of its rows.
        width: Entries per row.
        bytes: Its size.
        lookups: Rows looked up per request now.
        needed: Rows that need be looked up, if what is the same for all candidates is looked up once.
        level: Level of the ids.
        inputs: Inputs that the ids come from.
    """

    name: str
    rows: int
    width: int
    bytes: int
    lookups: int
    needed: int
    level: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Sequence:
    """An input that holds a sequence per row.

    Attributes:
        input: The input.
        length: Steps; 0 where it is not fixed.
        level: Its level.
        tables: Tables that its ids look up.
        readers: Operators that take the sequence in first: GRU, Softmax, ReduceSum ...
    """

    input: str
    length: int
    level: str
    tables: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """Everything there is to say about one model.

    Attributes:
        version: Version of onnxrank.
        source: Path of the model, if it is a file.
        source_sha256: Hash of its bytes.
        optimised: Whether it carries a contract of onnxrank.
        interface: `request` or `same`, for what `optimize` would make.
        candidates: Expected number of candidates, least and most.
        roles: The roles, as in the contract.
        inputs: The inputs.
        before: Costs by level.
        after: Costs by level of what `optimize` makes of it.
        ideal: The block ideal.
        layers: Costs by layer, in order, the whole model first.
        opportunities: What `optimize` takes, best first.
        refusals: What it leaves alone.
        tables: Embedding tables.
        sequences: Sequences.
        predictions: Predicted ratio of times over the number of candidates.
        tensors: All tensors.
        nodes: All nodes.
        result: The nodes of what `optimize` makes; empty where it changes nothing.
        notes: Anything else worth knowing, a sentence each.
    """

    version: str
    source: str | None
    source_sha256: str
    optimised: bool
    interface: str
    candidates: tuple[int, int]
    roles: dict[str, Any]
    inputs: tuple[InputTensor, ...]
    before: dict[str, LevelCost]
    after: dict[str, LevelCost]
    ideal: Ideal
    layers: tuple[Layer, ...]
    opportunities: tuple[Opportunity, ...]
    refusals: tuple[Refused, ...]
    tables: tuple[Table, ...]
    sequences: tuple[Sequence, ...]
    predictions: tuple[Prediction, ...]
    tensors: tuple[Tensor, ...]
    nodes: tuple[Node, ...]
    result: tuple[Node, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def macs_before(self) -> int:
        """Multiply-adds per request."""
        return sum(c.macs for c in self.before.values())

    @property
    def macs_after(self) -> int:
        """Multiply-adds per request of what `optimize` makes."""
        return sum(c.macs for c in self.after.values())

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `inspect.schema.json` describes it."""
        return {"schema": "onnxrank.inspect", "schema_version": SCHEMA_VERSION, **asdict(self)}
