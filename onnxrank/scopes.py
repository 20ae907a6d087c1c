"""The layer of the user's program that a node comes from, as exporters note it."""

from __future__ import annotations

import ast

from onnx import NodeProto

_TORCH = "pkg.torch.onnx.name_scopes"

Scope = tuple[str, ...]
"""Names of nested layers, outermost first; empty for what is in none."""


def scope_of(node: NodeProto) -> Scope:
    """The nested layers that a node belongs to.

    torch's newer exporter lists them in the node's metadata, with the whole path in every entry; the older one, and
    TensorFlow's, put them into the node's name, divided by slashes.
    """
    for p in node.metadata_props:
        if p.key == _TORCH:
            try:
                found = ast.literal_eval(p.value)
            except (ValueError, SyntaxError):
                break
            if isinstance(found, list) and all(isinstance(s, str) for s in found):
                return _own_names([s for s in found[:-1] if s])
    return tuple(part for part in node.name.split("/")[:-1] if part)


def _own_names(paths: list[str]) -> Scope:
    """Path by path the part that its outer layer does not have."""
    out, outer = [], ""
    for path in paths:
        out.append(path.removeprefix(outer + ".") if outer else path)
        outer = path
    return tuple(out)
