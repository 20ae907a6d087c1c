"""Closed forms against what models execute, and figures that belong to what was timed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import yaml

from scripts import sweep
from scripts.coverage import Requests
from scripts.yardstick import Trace, block_ideal, per_rows

FOLDER = Path(__file__).resolve().parents[2] / "models" / "onnx"
# The small scale's, written down again, so that no torch is needed.
SMALL: dict[str, dict[str, Any]] = {
    "dlrm": dict(user=5, item=3, user_dense=4, vocab=50, dim=8, bottom=(), top=(32, 16)),
    "dcnv2_parallel": dict(user=5, item=3, vocab=50, dim=8, layers=3, hidden=(32, 16)),
    "history_transformer": dict(history=12, vocab=60, dim=8, heads=2, layers=2, hidden=(16,)),
}
DCNV2 = dict(user=24, item=8, dim=32, layers=3, hidden=(1024, 512, 256))


def requests(family: str) -> tuple[Trace, Requests]:
    path = FOLDER / f"{family}.torchscript.onnx"
    roles = yaml.safe_load((FOLDER / f"{family}.roles.yaml").read_text())
    return Trace(path), Requests(onnx.load(path), roles)


@pytest.mark.parametrize("family", SMALL)
def test_closed_forms_are_what_is_executed(family: str) -> None:
    trace, draw = requests(family)
    forms = sweep.FORMS[family](**SMALL[family])
    assert per_rows(trace, lambda n: draw(n, 0)[0]) == pytest.approx(forms["original"])


@pytest.mark.parametrize(
    ("family", "form"), [("dlrm", "split"), ("dcnv2_parallel", "split"), ("history_transformer", "amortised")]
)
def test_closed_forms_of_the_papers_are_the_block_ideal(family: str, form: str) -> None:
    trace, draw = requests(family)
    ideal = block_ideal(trace, lambda n, seed: draw(n, seed)[0], rows=(7, 11))
    assert ideal == pytest.approx(sweep.FORMS[family](**SMALL[family])[form], rel=1e-3)


def test_savings_of_the_papers() -> None:
    """The rows of the rank-aware decomposition, (N-1) d_c (d + h) for DCNv2, and MaRI's 10.945 at B = 2000."""
    n, c = 512, 768
    forms = sweep.dcnv2_forms(**DCNV2)
    saved = sweep.total(forms["original"], n) - sweep.total(forms["split"], n)
    assert saved == (n - 1) * c * (1024 + 1024)
    forms = sweep.fusion_forms(user=10**6, item=10**5, hidden=1)
    assert sweep.ratios(forms, 2000)["split"] == pytest.approx(10.945, abs=1e-3)


@pytest.mark.parametrize(
    ("form", "n", "left"), [("split", 512, 0.67), ("head", 512, 0.52), ("affine", 512, 0.39), ("affine", 2048, 0.30)]
)
def test_affine_cross_layers(form: str, n: int, left: float) -> None:
    assert 1 / sweep.ratios(sweep.dcnv2_forms(**DCNV2), n)[form] == pytest.approx(left, abs=0.008)


def test_affine_is_counted_as_made() -> None:
    """Makes the context half of every layer as a map of the candidate halves, counting each product."""
    rng = np.random.default_rng(0)
    c, t, layers, hidden, n = 6, 4, 4, (5, 3), 7
    counted = {"once": 0, "each": 0}

    def mm(a: Any, b: Any, rank: str) -> Any:
        counted[rank] += a.shape[0] * a.shape[1] * b.shape[1] // (n if rank == "each" else 1)
        return a @ b

    w = [rng.standard_normal((c + t, c + t)) for _ in range(layers)]
    b = [rng.standard_normal(c + t) for _ in range(layers)]
    head = rng.standard_normal((c + t, 1))
    c0, t0 = rng.standard_normal((1, c)), rng.standard_normal((n, t))
    x0 = x = np.hstack([np.repeat(c0, n, 0), t0])
    for k in range(layers):
        x = x0 * (x @ w[k] + b[k]) + x
    constant, maps, halves = c0, [], [t0]
    for k in range(layers):
        cc, ct, tc, tt = w[k][:c, :c], w[k][:c, c:], w[k][c:, :c], w[k][c:, c:]
        y = mm(constant, ct, "once") + b[k][c:] + mm(halves[-1], tt, "each")
        y = y + sum(mm(h, mm(m, ct, "once"), "each") for m, h in zip(maps, halves, strict=False))
        if k < layers - 1:
            maps = [mm(m, cc, "once") * c0 + m for m in maps] + [tc * c0]
            constant = c0 * (mm(constant, cc, "once") + b[k][:c]) + constant
        else:
            into = c0.T * head[:c]
            through = mm(cc, into, "once") + head[:c]
            score = mm(constant, through, "once") + b[k][:c] @ into
            ends = [mm(m, through, "once") for m in maps] + [mm(tc, into, "once")]
            score = score + sum(mm(h, e, "each") for e, h in zip(ends, halves, strict=True))
        halves.append(t0 * y + halves[-1])
    score = score + mm(halves[-1], head[c:], "each")
    np.testing.assert_allclose(score, x @ head, rtol=1e-9)
    forms = sweep.dcnv2_forms(c, t, 1, layers, hidden)
    deep = (c * hidden[0], t * hidden[0] + hidden[0] * hidden[1] + hidden[1])
    assert counted["each"] == forms["affine"][1] - deep[1]
    assert counted["once"] == forms["affine"][0] - deep[0]


@pytest.mark.parametrize("part", sweep.PARTS)
def test_cases(part: str) -> None:
    found = list(sweep.cases(part))
    assert len({case.name for case in found}) == len(found)
    for case in found:
        for n in case.rows:
            forms = sweep.timed_forms(case, n)
            assert len(forms) == len(set(forms))
            assert sum(form.endswith("original") for form in forms) == len(case.layouts)
            # A form for another number of candidates has no business here.
            assert not any(".for_" in f or f.startswith("for_") for f in forms if not f.endswith(f"for_{n}"))
    if part == "share":
        sizes = {case.family: set() for case in found}
        for case in found:
            sizes[case.family].add(case.sizes["user"] + case.sizes["item"])
        assert all(len(totals) == 1 for totals in sizes.values())


def test_batches_count_for_all_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original gets 2 of 6 candidates at a time, and three times its time."""
    case = sweep.Case("history", "small", "history_transformer", {}, (6,), batch=2)
    (tmp_path / "history").mkdir()
    for form in ("original", "optimised"):
        shutil.copy(FOLDER / "history_transformer.torchscript.onnx", tmp_path / "history" / f"small.{form}.onnx")
    shutil.copy(FOLDER / "history_transformer.roles.yaml", tmp_path / "history" / "small.roles.yaml")
    rows = {}

    def fake(forms: list[str], make: Any, sessions: int, seconds: float, least: int) -> dict[str, float]:
        for form in forms:
            opened, feed = make(form, 0)
            rows[form] = (len(feed["hist_ids"]), len(feed["item_id"]))
            assert {i.name for i in opened.get_inputs()} == {"hist_ids", "item_id"}
        return dict.fromkeys(forms, 1.0)

    monkeypatch.setattr(sweep, "medians_over_sessions", fake)
    found = sweep.take_times(case, tmp_path, ["optimised"], 0.0, 1)
    assert rows == {"original": (2, 2), "optimised": (1, 6)}
    assert found == {"times": {"6": {"original": 3000.0, "optimised": 1000.0}}}


def results() -> dict[str, dict[str, Any]]:
    """As if everything had taken times in proportion to its multiply-adds; fragments cost 2 % more."""
    out: dict[str, dict[str, Any]] = {}
    sizes = {
        "dlrm": dict(user_dense=13, dim=64, bottom=(64,), top=(512, 256)),
        "dcnv2_parallel": dict(dim=32, layers=3, hidden=(1024, 512, 256)),
        "fusion": dict(user=1280, item=128),
        "history_transformer": dict(dim=64, layers=3, hidden=(64,)),
    }
    for part in sweep.PARTS:
        for case in sweep.cases(part):
            given = {**sizes[case.family], **(case.sizes or {"user": 18, "item": 8})}
            closed = sweep.FORMS[case.family](**given)
            macs, times = {}, {}
            for n in case.rows:
                forms = sweep.timed_forms(case, n)
                for form in forms:
                    macs[form] = closed["original"] if form.endswith("original") else list(closed.values())[1]
                slow = {form: 1.02 if "fragmented" in form else 1.0 for form in forms}
                times[str(n)] = {form: sweep.total(macs[form], n) * slow[form] for form in forms}
            entry = {"closed": closed, "macs": macs, "times": times}
            if len(case.layouts) > 1:
                entry["alone"] = times
            out.setdefault(part, {})[case.name] = entry
    return out


def test_points() -> None:
    found = results()
    for part in ("share", "candidates", "history"):
        for p in sweep.points(part, found[part]):
            assert p["time"] == pytest.approx(p["macs"])
            assert p["macs"] == pytest.approx(next(iter(p["closed"].values())))
    costs = list(sweep.layout_costs(found["layout"]))
    assert len(costs) == 3 * len(sweep.MARI_ROWS) * len(sweep.MARI_HIDDEN)
    for c in costs:
        assert c["optimised"] == pytest.approx(1.0 if c["layout"] == "packed" else 1.02)
    assert "fragmented over neat: at most 1.020" in sweep.as_text(found)
    del found["share"]["dlrm_0.5"]["times"]
    assert [p["time"] for p in sweep.points("share", found["share"]) if p["case"] == "dlrm_0.5"] == [None]


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = sweep.plot(results(), tmp_path, tmp_path / "figures" / "sweep.svg")
    assert {f.name for f in files} == {*(f"{part}.svg" for part in sweep.PARTS), "sweep.svg"}
    first = [f.read_bytes() for f in files]
    assert all(len(content) < 60_000 for content in first)
    text = " ".join(e.text or "" for e in ElementTree.fromstring(first[-1]).iter() if e.tag.endswith("text"))
    assert "DLRM" in text and "candidates N" in text
    assert [f.read_bytes() for f in sweep.plot(results(), tmp_path, tmp_path / "figures" / "sweep.svg")] == first
