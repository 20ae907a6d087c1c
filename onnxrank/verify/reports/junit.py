"""JUnit XML: a test case per provider, level, kind of inputs, number of candidates, seed and output.

There is no standard; this is the form that the schemas of Ant and Jenkins both take.
"""

from __future__ import annotations

import datetime
import platform
from xml.etree import ElementTree as ET

from onnxrank.verify.report import TITLES, VERDICTS, Finding, Report
from onnxrank.writers import printable


def to_xml(report: Report) -> str:
    """The report as a JUnit document: a suite per verdict."""
    root = ET.Element("testsuites")
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    for number, verdict in enumerate(VERDICTS):
        if report.verdicts[verdict] == "skipped" and not any(f.verdict == verdict for f in report.errors):
            continue
        cases = [c for c in report.cases if c.verdict == verdict]
        others = [f for f in report.errors if f.verdict == verdict and f.kind != "difference"]
        crashes = [f for f in others if f.kind in ("crash", "timeout")]
        failures = sum(not c.passed for c in cases) + len(others) - len(crashes)
        whole = not cases and not others
        suite = ET.SubElement(
            root,
            "testsuite",
            {
                "name": verdict,
                "package": "onnxrank.verify",
                "id": str(number),
                "timestamp": when,
                "hostname": platform.node() or "localhost",
                "tests": str(len(cases) + len(others) + whole),
                "failures": str(failures),
                "errors": str(len(crashes)),
                "time": f"{report.seconds if verdict == 'rounding' else 0:.3f}",
            },
        )
        properties = ET.SubElement(suite, "properties")
        for name, value in report.environment.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            ET.SubElement(properties, "property", {"name": name, "value": _clean(shown)})
        for c in cases:
            case = _case(
                suite, f"{c.output} [{c.inputs}, N={c.candidates}, seed={c.seed}]", f"{verdict}.{c.provider}.{c.level}"
            )
            if not c.passed:
                place = c.place
                spot = (
                    f" at {place.output}{list(place.element)}: {place.found} instead of {place.expected}"
                    if place
                    else ""
                )
                text = f"off by {c.error:.3g} where {c.allowed:.3g} is allowed{spot}"
                ET.SubElement(case, "failure", {"message": _clean(text), "type": verdict})
        for f in others:
            _failed(_case(suite, f.kind, verdict), f)
        if whole:
            _case(suite, TITLES[verdict], verdict)
        ET.SubElement(suite, "system-out").text = _clean(
            "\n".join(f"{f.severity}: {f.message}" for f in report.findings if f.verdict == verdict), "\n"
        )
        ET.SubElement(suite, "system-err")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, name: str, group: str) -> ET.Element:
    attributes = {"name": _clean(name), "classname": _clean(f"onnxrank.verify.{group}"), "time": "0"}
    return ET.SubElement(suite, "testcase", attributes)


def _failed(case: ET.Element, f: Finding) -> None:
    kind = "error" if f.kind in ("crash", "timeout") else "failure"
    ET.SubElement(case, kind, {"message": _clean(f.message), "type": f.kind})


def _clean(text: str, keep: str = "") -> str:
    """Text without what XML 1.0 cannot hold."""
    safe = printable(text, "utf-8", keep=keep)
    return "".join(c for c in safe if c not in "\ufffe\uffff")
