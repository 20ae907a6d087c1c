"""What is known of an operator: an entry of the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxrank import moves, transfers
from onnxrank.operators.known import Known, Partial

if TYPE_CHECKING:
    from onnxrank.operators.signatures import Signer
    from onnxrank.operators.use import Use

Shaper = Callable[["Use"], "list[Partial | None]"]
Valuer = Callable[["Use"], "list[Known | None]"]
Axes = Callable[["Use"], Sequence[int]]
Extents = tuple[int, ...]
"""A shape at the sizes that costs are counted at."""
Macs = Callable[[NodeProto, Sequence[Extents | None], Extents | None], int]


class Trait(Flag):
    """What an operator is; whoever has to know asks the registry, never the operator's name."""

    NONE = 0
    ELEMENTWISE = auto()
    """An entry of the result is computed from the entries in its place, operands broadcast as numpy does."""
    MOVEMENT = auto()
    """Results hold entries of the operands in other places, and nothing else."""
    FREE = auto()
    """Entries stay in their order, or are constants, so that nothing is done at run time."""
    RESHAPE = auto()
    """Movement that gives entries another shape and leaves them in their order."""
    ONCE = auto()
    """Movement that gives entries of one tensor other places in one result, each at most one."""
    PICK = auto()
    """Movement or look-up that copies some entries of one tensor, or of several, side by side."""
    LOOKUP = auto()
    """Entries of the first operand at positions that the second one holds."""
    PRODUCT = auto()
    """A sum of products, which counts as multiply-adds."""
    MATRIX = auto()
    """A product of two matrices, or stacks of them, the first of which is the first input."""
    LINEAR = auto()
    """A product that is linear in its first operand, where the others are constants."""
    TREES = auto()
    """Comparisons down decision trees, each of which counts as a multiply-add."""
    RECURRENT = auto()
    """Steps along a sequence, with products in each."""
    REDUCTION = auto()
    """Entries along some axes are taken in together: sums, extrema, pools, running sums."""
    NORMALISATION = auto()
    """The shape stays, and every entry depends on all those along some axes."""
    COMMUTATIVE = auto()
    """An elementwise operator of two operands whose order does not matter."""
    FUNCTION = auto()
    """An elementwise function that takes a runtime longer than arithmetic does."""
    SLOW = auto()
    """Takes a runtime five times as long as other functions."""
    SERIAL = auto()
    """Computed one entry after the other, which takes a runtime longer still."""
    AXIS = auto()
    """A normalisation along the attribute `axis`, the last one if there is none."""
    ROWS = auto()
    """A normalisation whose time goes by rows."""
    EXTENTS = auto()
    """Reads the shape of its operand, not its entries."""
    RANDOM = auto()
    """Two runs may give different results."""
    IMAGES = auto()
    """Rows lie along the first axis, and everything behind it is taken in together."""
    ADDITIVE = auto()
    """The sum or the difference of two numbers."""
    SCALING = auto()
    """The product or the quotient of two numbers."""
    CHOICE = auto()
    """Of several numbers one, which is why ids behind it are still ids."""
    SMOOTH = auto()
    """Makes no more of a small difference than its operands are large."""
    PARAMETERS = auto()
    """Operands behind the first have no entries in places: they are single numbers, or give a type."""
    CAST = auto()
    """Entries in another type."""
    BOOLEAN = auto()
    """Gives conditions."""
    COMPARISON = auto()
    """Conditions on which of two numbers is the greater."""
    SEQUENCE = auto()
    """Gives sequences, maps or optionals, which have no shape."""


@dataclass(frozen=True)
class Operator:
    """What is known of an operator.

    Attributes:
        shape: Shapes of its outputs; None asks onnx's own inference.
        value: Its outputs where all operands are constants or extents.
        like: Input whose element type its outputs have, where onnx has no schema of it.
        traits: What it is.
        move: What it moves where, if it only moves entries.
        axes: The axes of its first operand that it takes in together, for reductions and normalisations.
        levels: Levels of its results, where they do not follow from the traits.
        factors: Of a product, the inputs that are multiplied; its weights may also be in attributes.
        macs: Multiply-adds of its products, from the shapes of its operands and of its first output; of trees, the
            comparisons.
        signature: Which axes of its operands and results it works on one by one, where no trait or rule says so.
    """

    shape: Shaper | None = None
    value: Valuer | None = None
    like: int = 0
    traits: Trait = Trait.NONE
    move: moves.Mover | None = None
    axes: Axes | None = None
    levels: transfers.Transfer | None = None
    factors: tuple[int, ...] = (0, 1)
    macs: Macs | None = None
    signature: Signer | None = None

    @property
    def random(self) -> bool:
        """Whether two runs may give different results."""
        return Trait.RANDOM in self.traits
