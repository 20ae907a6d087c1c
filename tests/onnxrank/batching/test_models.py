"""Every model of the repository, several requests per call, in every form."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxrank.batching.engine import Options, batch
from onnxrank.roles import load_spec

MODELS = sorted((Path(__file__).resolve().parents[3] / "models" / "onnx").glob("*.onnx"))
FORMS = [{"rows": rows} for rows in ("lengths", "offsets", "index", "triton")] + [{"interface": "padded"}]


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(MODELS)), ids=lambda k: MODELS[k].stem)
def test_scores_are_those_of_single_requests(k: int) -> None:
    """1, 2, 5 and 32 requests, some without candidates, in float64 and as served; forms take turns."""
    path = MODELS[k]
    spec = load_spec(path.with_name(f"{path.name.split('.')[0]}.roles.yaml"))
    made = batch(path, spec=spec, options=Options(**FORMS[k % len(FORMS)]), check="quick")
    assert made.changed and made.report.checks
