"""Exports of models with a history, of fixed and of symbolic length."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto

import onnxrank

torch = pytest.importorskip("torch", reason="models are exported with torch")

from scripts import history_lengths  # noqa: E402


def _length(model: ModelProto) -> int | str:
    (history,) = [i for i in model.graph.input if i.name == "hist_ids"]
    dim = history.type.tensor_type.shape.dim[1]
    return dim.dim_value or dim.dim_param


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", ["dmr", "hstu"])
def test_both_exporters_take_models_that_are_cut(name: str, exporter: str) -> None:
    """Whose positions are cut to the length, and whose forward takes inputs one by one or all that there are."""
    module, specs = history_lengths.MODELS[name]()
    assert _length(history_lengths.export(module, specs, exporter, symbolic=False, length=9)) == 9
    before = history_lengths.export(module, specs, exporter, symbolic=True)
    assert isinstance(_length(before), str)
    for length in (1, 7):
        feed = history_lengths.draw(specs, 3, length)
        with torch.no_grad():
            wanted = module(*(torch.from_numpy(feed[s.name]) for s in specs))
        (scores,) = history_lengths.run(history_lengths.session(before), feed)
        np.testing.assert_allclose(scores, wanted.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hyformer", "onetrans", "hstu"])
def test_a_symbolic_length_is_rewritten_as_a_fixed_one(name: str) -> None:
    """No more is left to do for each candidate, by as many softmaxes: heads stay apart as they do at a fixed length."""
    module, specs = history_lengths.MODELS[name]()
    shares, softmaxes = [], []
    for symbolic in (False, True):
        before = history_lengths.export(module, specs, "torchscript", symbolic)
        made = onnxrank.optimize(before, request=[s.name for s in specs if s.level == "request"], check=False).model
        shares.append(history_lengths.left(before, made, specs))
        softmaxes.append(sum(n.op_type == "Softmax" for n in made.graph.node))
    assert shares[1] <= 1.03 * shares[0]
    # The queries of OneTrans are of four kinds, which are not joined at a symbolic length.
    assert name == "onetrans" or softmaxes[1] == softmaxes[0]
