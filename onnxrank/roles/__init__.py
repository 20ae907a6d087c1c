"""Roles: which graph inputs, or columns of one, are the same for all candidates of a request.

Roles come from `--request` patterns (`resolving.py`), from a roles file (`files.py`) or from recorded requests
(`inference.py`), and always end up as one `Roles` with an `InputRole` for every graph input (`role.py`).
"""

from onnxrank.roles.files import load_spec
from onnxrank.roles.inference import infer
from onnxrank.roles.positions import format_ranges, parse_ranges
from onnxrank.roles.resolving import check_positions, resolve
from onnxrank.roles.role import InputInfo, InputRole, Roles, ValueRange

__all__ = [
    "InputInfo",
    "InputRole",
    "Roles",
    "ValueRange",
    "check_positions",
    "format_ranges",
    "infer",
    "load_spec",
    "parse_ranges",
    "resolve",
]
