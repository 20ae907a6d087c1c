"""The layouts of the fusion model are layouts of one computation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

torch = pytest.importorskip("torch")


@pytest.mark.slow
def test_layouts_agree() -> None:
    from models.fusion import Fusion
    from models.layers import initialise

    built = {}
    for layout in ("neat", "fragmented", "packed", "pieces", "fragmented_pieces"):
        built[layout] = Fusion(**Fusion.scales["small"], layout=layout)
        initialise(built[layout], seed=0)
    user, item = torch.rand(3, 40), torch.rand(3, 4)
    pieces = [*user.split(10, dim=1), *item.split(1, dim=1)]
    packed = torch.cat([p for pair in zip(pieces[:4], pieces[4:], strict=True) for p in pair], dim=1)
    same = built["fragmented"].state_dict()
    for module in built.values():
        module.load_state_dict(same)
    expected = built["fragmented"](user, item)
    torch.testing.assert_close(built["packed"](packed), expected)
    torch.testing.assert_close(built["fragmented_pieces"](*pieces), expected)
    torch.testing.assert_close(built["neat"](user, item), built["pieces"](*pieces))
    assert not torch.allclose(built["neat"](user, item), expected)
    (spec,) = built["packed"].specs
    assert spec.request_columns == "0:10,11:21,22:32,33:43"
