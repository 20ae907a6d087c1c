"""What a caller of `split` may choose about the two models."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onnxrank.batching.rows import FORMS as FORMS_OF_ROWS
from onnxrank.errors import UsageError
from onnxrank.splitting import formats

FORMS = ("named", "packed")
DTYPES = ("float32", "float16")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Options:
    """What a caller of `split` may choose about the two models.

    Attributes:
        format: `plain`, `python` or `triton`.
        state: `named`: a tensor each. `packed`: one vector of floats.
        dtype: `float32`, or `float16` for floats that are rounded on the way.
        most: Bytes that the state may have at most, at the longest lengths served; None for no limit.
        guard: Whether the candidate model takes the version of the state, and gives NaN for another than its own.
        name: What the models are called; None for the file's name.
        rows: What tells the candidate model which candidates are whose, so that it takes several requests: `lengths`,
            `offsets`, `index` or `triton`, as for models of the interface `batch`; None for one request per call.
        pack: Whether inputs lie side by side in few matrices.

    Raises:
        UsageError: A value is not one that there is.
    """

    format: str = "plain"
    state: str = "named"
    dtype: str = "float32"
    most: int | None = None
    guard: bool = True
    name: str | None = None
    rows: str | None = None
    pack: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (
            ("format", self.format, formats.FORMATS),
            ("state", self.state, FORMS),
            ("state dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise UsageError(f"the {what} {value!r} is not known; use {', '.join(map(repr, known))}")
        if self.rows is not None and self.rows not in FORMS_OF_ROWS:
            raise UsageError(f"rows {self.rows!r} are not known; use {', '.join(map(repr, FORMS_OF_ROWS))}")
        if self.rows is not None and (self.format == "python" or (self.format == "triton") != (self.rows == "triton")):
            raise UsageError(
                "several requests per call: rows 'triton' are for the format 'triton', others for 'plain', none for "
                "'python'"
            )
        if self.most is not None and self.most < 1:
            raise UsageError(f"a state of at most {self.most} bytes cannot be")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise UsageError(f"the name {self.name!r} holds other signs than letters, digits, _, - and .")
