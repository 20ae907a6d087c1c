"""What was decided, as data: a method and its parameter per site. `--plan` does the same again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxrank.errors import UsageError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Step:
    """What is done at one site.

    Attributes:
        site: Its name.
        chain: Methods with their parameters, each on what the one before left behind.
    """

    site: str
    chain: tuple[tuple[str, int], ...]

    @property
    def told(self) -> str:
        """The chain in words: `low-rank 32, int8`."""
        return ", ".join(f"{name} {k}" if k else name for name, k in self.chain)


@dataclass(frozen=True)
class Tuning:
    """How layers of low rank are trained.

    Attributes:
        epochs: How often over the calibration rows.
        relu: Whether with a ReLU between the factors.
        seed: Of the order of rows.
    """

    epochs: int = 3
    relu: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that was decided.

    Attributes:
        model_sha256: Hash of the model that it belongs to.
        steps: In the order in which they were accepted; the last one of a site counts.
        pack: Whether what does nothing is packed away first.
        sequential: Whether layers of low rank are fitted to what the compressed model sees.
        refit: Whether the last layers are fitted again.
        finetune: How layers of low rank are trained; None if not.
    """

    model_sha256: str
    steps: tuple[Step, ...] = ()
    pack: bool = False
    sequential: bool = False
    refit: bool = False
    finetune: Tuning | None = None

    @property
    def by_site(self) -> dict[str, Step]:
        """What is done at each site in the end."""
        return {s.site: s for s in self.steps}

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "onnxrank.compress.plan",
            "model_sha256": self.model_sha256,
            "pack": self.pack,
            "sequential": self.sequential,
            "refit": self.refit,
            "finetune": None if self.finetune is None else vars(self.finetune),
            "steps": [
                {"site": s.site, "methods": [{"method": name, "parameter": k} for name, k in s.chain]}
                for s in self.steps
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the plan") -> Plan:
        """Reads the JSON form.

        Raises:
            UsageError: It is none.
        """
        try:
            if data["kind"] != "onnxrank.compress.plan" or data["schema_version"] != SCHEMA_VERSION:
                raise UsageError(f"{where} is no plan of this version of onnxrank compress.")
            steps = tuple(
                Step(str(s["site"]), tuple((str(m["method"]), int(m["parameter"])) for m in s["methods"]))
                for s in data["steps"]
            )
            flags = {k: bool(data[k]) for k in ("pack", "sequential", "refit")}
            how = data.get("finetune")
            tuning = None if how is None else Tuning(int(how["epochs"]), bool(how["relu"]), int(how["seed"]))
            return cls(str(data["model_sha256"]), steps, **flags, finetune=tuning)
        except (KeyError, TypeError, ValueError) as e:
            raise UsageError(f"{where} is no plan of onnxrank compress: {type(e).__name__} at {e}.") from e

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a file.

        Raises:
            UsageError: It cannot be read, or is no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise UsageError(f"The plan {os.fspath(path)} cannot be read: {e.strerror or e}.") from e
        except ValueError as e:
            raise UsageError(f"The plan {os.fspath(path)} is no JSON: {e}.") from e
        if not isinstance(data, dict):
            raise UsageError(f"{os.fspath(path)} is no plan of onnxrank compress.")
        return cls.from_dict(data, os.fspath(path))
