"""SARIF 2.1.0, for tools that show findings beside what they are about (GitHub code scanning, IDEs)."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from onnxrank.verify.report import TITLES, Finding, Report
from onnxrank.writers import dumps, printable

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_HELP = "Each verdict answers one question; the report of onnxrank verify says which inputs show the difference."


def to_json(report: Report) -> str:
    """The report as a SARIF log."""
    return dumps(to_dict(report))


def to_dict(report: Report) -> dict[str, Any]:
    """The SARIF log as an object."""
    rules = sorted({(f.verdict, f.kind) for f in report.findings})
    index = {rule: k for k, rule in enumerate(rules)}
    models = [
        {"location": {"uri": _uri(path)}, "hashes": {"sha-256": sha}}
        for path, sha in (
            (report.original, report.original_sha256),
            (report.optimized, report.optimized_sha256),
        )
        if path is not None
    ]
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "onnxrank verify",
                "version": report.version,
                "rules": [
                    {
                        "id": f"{verdict}/{kind.replace(' ', '-')}",
                        "name": "".join(w.capitalize() for w in f"{verdict} {kind}".split()),
                        "shortDescription": {"text": f"{verdict}: {kind}"},
                        "fullDescription": {"text": f"The verdict asks: {TITLES[verdict]}?"},
                        "help": {"text": _HELP},
                    }
                    for verdict, kind in rules
                ],
            }
        },
        "invocations": [{"executionSuccessful": True, "exitCode": 0 if report.passed else 1}],
        "artifacts": models,
        "results": [_result(report, f, index[f.verdict, f.kind]) for f in report.findings],
        "columnKind": "unicodeCodePoints",
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(report: Report, f: Finding, rule: int) -> dict[str, Any]:
    path = report.original if f.model == "original" else report.optimized
    location: dict[str, Any] = {}
    if path is not None:
        location["physicalLocation"] = {"artifactLocation": {"uri": _uri(path)}, "region": {"startLine": 1}}
    logical = [
        {"name": _clean(name), "kind": kind}
        for name, kind in ((f.node, "node"), (f.place.output if f.place else None, "output"))
        if name
    ]
    if logical:
        location["logicalLocations"] = logical
    same = f"{f.verdict}/{f.kind}/{f.model}/{f.place.output if f.place else f.message}"
    print_of = hashlib.sha256(_clean(same).encode())
    out: dict[str, Any] = {
        "ruleId": f"{f.verdict}/{f.kind.replace(' ', '-')}",
        "ruleIndex": rule,
        "level": f.severity,
        "message": {"text": _clean(f.message)},
        "partialFingerprints": {"onnxrankFinding/v1": print_of.hexdigest()[:32]},
    }
    if location:
        out["locations"] = [location]
    if f.rule is not None:
        out["properties"] = {"rule": _clean(f.rule)}
    return out


def _uri(path: str) -> str:
    """A path as a URI reference: relative where it is."""
    if os.path.isabs(path):
        return PurePath(path).as_uri()
    return quote(PurePath(path).as_posix().encode("utf-8", "surrogateescape"))


def _clean(text: str) -> str:
    return printable(text, "utf-8")
