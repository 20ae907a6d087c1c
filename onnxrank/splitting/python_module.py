"""The Python module of one file that serves two models: `onnxrank.ranker`, with what the models take written on top."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnxrank import ranker


def source(contract: Mapping[str, Any]) -> str:
    """The module's text.

    Args:
        contract: Content of `contract.json`.
    """
    own = Path(ranker.__file__).read_text(encoding="utf-8")
    head, _, rest = own.removeprefix('"""').partition('"""')
    models = contract["models"]
    given = {t["name"] for t in contract["state"]["tensors"]} | {ranker.VERSION}
    lines = [
        head.rstrip(),
        "",
        "    from ranker import Ranker",
        "",
        "    ranker = Ranker()  # reads contract.json and the models beside this file",
        "    scores = ranker.score(request, candidates)  # arrays by name, both ways",
        "",
        "The request, one row:",
        *_listed(_single(models["request"]["inputs"])),
        "Candidates, a row each:",
        *_listed(_single(i for i in models["candidate"]["inputs"] if i["name"] not in given)),
        *_side_by_side([*models["request"]["inputs"], *models["candidate"]["inputs"]]),
        "Outputs:",
        *_listed(models["candidate"]["outputs"]),
        "",
        f"Written by onnxrank {contract['version']} for state version {contract[ranker.VERSION]}.",
    ]
    return '"""' + "\n".join(lines) + '\n"""' + rest


def _single(inputs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Inputs one by one."""
    return [c | {"type": i["type"]} for i in inputs for c in i.get("columns", [i])]


def _side_by_side(inputs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which inputs lie side by side."""
    lines = []
    for i in inputs:
        if "columns" in i:
            names = ", ".join(_safe(c["name"]) + (f" ({c['width']})" if c["width"] > 1 else "") for c in i["columns"])
            lines += ["", f"    {_safe(i['name'])}: {i['type']} {i['shape']}, columns {names}"]
    return ["Or packed side by side, the columns in this order:", *lines[1:]] if lines else []


def _listed(values: Iterable[Mapping[str, Any]]) -> list[str]:
    return [
        f"    {_safe(v['name'])}: {v['type']} [{', '.join('?' if d is None else _safe(str(d)) for d in v['shape'])}]"
        for v in values
    ]


def _safe(text: str) -> str:
    """A name that does not end the docstring."""
    return repr(text)[1:-1].replace('"', "'")
