"""Draws which module of onnxrank imports which, as Mermaid in ARCHITECTURE.md, and checks the layers of pyproject.toml.

python scripts/import_graph.py            # print the picture
python scripts/import_graph.py --write    # put it into ARCHITECTURE.md
python scripts/import_graph.py --check    # the layers hold, and the picture is of this state
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "ARCHITECTURE.md"
_PLACE = re.compile(r"(<!-- imports -->\n).*?(<!-- /imports -->)", re.DOTALL)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The package as a wheel holds it, with the rules in it, in the current folder and first on the path."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copytree(ROOT / "onnxrank", "onnxrank")
        shutil.copytree(ROOT / "rules", "onnxrank/rules")
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)


def imports() -> dict[str, set[str]]:
    """What each module, or package, right below `onnxrank` imports of the others; not what only type checkers see."""
    import grimp

    with installed():
        graph = grimp.build_graph("onnxrank", exclude_type_checking_imports=True, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules - {"onnxrank"}:
        name = module.split(".")[1]
        others = {m.split(".")[1] for m in graph.find_modules_directly_imported_by(module) if m != "onnxrank"}
        found.setdefault(name, set()).update(others - {name})
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the edges that a longer way implies."""
    reached: dict[str, set[str]] = {}

    def beyond(name: str) -> set[str]:
        if name not in reached:
            reached[name] = set()  # Ends a circle, which --check refuses.
            reached[name] = set().union(*({other} | beyond(other) for other in graph[name]))
        return reached[name]

    return {
        name: {other for other in others if not any(other in beyond(via) for via in others - {other})}
        for name, others in graph.items()
    }


def mermaid(graph: dict[str, set[str]]) -> str:
    """The graph as Mermaid."""
    lines = [f"  {name} --> {other}" for name in sorted(graph) for other in sorted(graph[name])]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="put the picture into ARCHITECTURE.md")
    how.add_argument("--check", action="store_true", help="check the layers, and that the picture is of this state")
    given = parser.parse_args()
    picture = mermaid(reduced(imports()))
    text = DOCUMENT.read_text(encoding="utf-8")
    drawn = _PLACE.sub(lambda match: match[1] + picture + match[2], text)
    if given.write:
        DOCUMENT.write_text(drawn, encoding="utf-8")
    elif not given.check:
        print(picture, end="")
    else:
        from importlinter.cli import lint_imports

        with installed():
            code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None, no_cache=True)
        if drawn != text:
            print("The picture in ARCHITECTURE.md is of another state: python scripts/import_graph.py --write")
        return code or int(drawn != text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
