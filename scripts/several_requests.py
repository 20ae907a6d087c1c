"""Holds models that take several requests per call against their originals, which score one request after the other.

Every model of a folder is made for several requests in every form: lengths, offsets, index, triton and padded. 1, 2, 5
and 32 requests are scored in one call, with no candidates, one, and hundreds among them, and each request's scores are
held against onnxruntime's own on the original. Requests are drawn from the roles files, by nothing of what is tested.

    python scripts/several_requests.py models/onnx
    python scripts/several_requests.py out/deepctr --forms lengths padded --names din mmoe --pack-inputs --check quick
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import yaml
from numpy.typing import NDArray

import onnxrank
from onnxrank import batches
from onnxrank.batching.engine import Options
from onnxrank.roles import load_spec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.coverage import LARGEST_ERROR, Requests

Arrays = dict[str, NDArray[Any]]
FORMS = ("lengths", "offsets", "index", "triton", "padded")
COUNTS = (
    *([1], [300]),
    *([0, 7], [257, 1]),
    *([0, 1, 200, 0, 3], [5, 0, 0, 0, 130]),
    *([0, 1, 2, 40] * 8, [0] * 16 + [3] * 15 + [300]),
)
"""Candidates of each request of a call."""
PADDED = ([1], [300], [1] * 2, [257] * 2, [200] * 5, [40] * 32)
"""The same where all have as many."""


def _session(source: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class Model:
    """A model, and what it gives for requests one after the other.

    Args:
        path: The model, with its roles file beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.roles = path, path.with_name(f"{path.name.split('.')[0]}.roles.yaml")
        self.session = _session(str(path))
        self.names = [o.name for o in self.session.get_outputs()]
        self.drawn = Requests(onnx.load(path), yaml.safe_load(self.roles.read_text()))
        self.request = cache(self._request)

    def _request(self, k: int, n: int) -> tuple[Arrays, Arrays]:
        """Inputs of the k-th request, and its scores; none where the model does not run: with one candidate or less."""
        whole, divided = self.drawn(n, k)
        try:
            return divided, dict(zip(self.names, self.session.run(self.names, whole), strict=True)) if n else {}
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
            if n > 1:
                raise
            return divided, {}

    def held(self, form: str, pack: bool, check: str | bool) -> tuple[float, list[str]]:
        """Makes the model for several requests and calls it.

        Args:
            form: How requests are told apart.
            pack: Whether inputs are packed.
            check: How thoroughly `batch` itself checks.

        Returns:
            The largest difference relative to a score's scale, and what is wrong.
        """
        how: dict[str, Any] = {"interface": "padded"} if form == "padded" else {"rows": form}
        options = Options(**how, requests=32, pack=pack)
        made = onnxrank.batch(self.path, spec=load_spec(self.roles), options=options, check=check).model
        told = batches.convention(made)
        assert told is not None
        session = _session(made.SerializeToString())
        largest, wrong = 0.0, []
        for counts in PADDED if form == "padded" else COUNTS:
            requests = [self.request(k, n) for k, n in enumerate(counts)]
            found = session.run(self.names, batches.joined(told, [feed for feed, _ in requests]))
            parts = batches.parted(told, dict(zip(self.names, found, strict=True)), counts)
            scale = {
                name: max((np.abs(want[name]).max(initial=0.0) for _, want in requests if want), default=0.0)
                for name in self.names
            }
            for n, (_, want), got in zip(counts, requests, parts, strict=True):
                far = _distance(want, got, scale)
                largest = max(largest, far)
                wrong += [] if far <= LARGEST_ERROR else [f"{len(counts)} requests, {n} candidates: {far:.1e}"]
        return largest, wrong


def _distance(want: Mapping[str, NDArray[Any]], got: Mapping[str, NDArray[Any]], scale: Mapping[str, float]) -> float:
    """The largest difference, relative to the output's scale; infinite for other shapes or no numbers.

    The scale is that of all requests of a call: of a single small score a Sigmoid's last digit is a large part.
    """
    largest = 0.0
    for name, scores in want.items():
        if got[name].shape != scores.shape or not np.isfinite(got[name]).all():
            return np.inf
        largest = max(largest, float(np.abs(got[name] - scores).max() / max(scale[name], 1e-30)))
    return largest


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line per model and form; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="a folder of models and their roles files")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, metavar="FORM")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--pack-inputs", action="store_true")
    parser.add_argument("--check", choices=("none", "quick", "standard", "full"), default="none")
    given = parser.parse_args(arguments)
    check = False if given.check == "none" else given.check
    made, failed, most = 0, 0, 0.0
    for path in sorted(given.models.glob("*.onnx")):
        if given.names and path.name.split(".")[0] not in given.names:
            continue
        model = Model(path)
        for form in given.forms:
            start = time.perf_counter()
            try:
                largest, wrong = model.held(form, given.pack_inputs, check)
            except Exception as e:  # of onnxrank, or of onnxruntime, whose have no class in common
                largest, wrong = np.inf, [str(e)]
            made, failed, most = made + 1, failed + bool(wrong), max(most, largest)
            told = "; ".join(wrong[:3]) if wrong else "right"
            print(f"{path.name:<40} {form:<8} {largest:.1e} {time.perf_counter() - start:5.1f} s  {told}", flush=True)
    print(f"{made} models, {failed} wrong, largest difference {most:.1e} of a score's scale")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
