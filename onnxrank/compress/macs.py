"""How many multiply-adds a plan leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxrank.compress.plan import Plan
from onnxrank.compress.sites import parts
from onnxrank.network import Hidden, Layer, Product, Site, Table


def multiply_adds(
    sites: Mapping[str, Site], rows: Mapping[str, int], plan: Plan, folded: Mapping[str, Sequence[str]]
) -> int:
    """Multiply-adds of the layers and tables of a model.

    Args:
        sites: Those of the model that the plan starts from, by name.
        rows: Rows that each layer and table works on, by name.
        plan: What was done.
        folded: Lookups of fewer columns, by what they gave in the original, with what reads them; see `fold_pca`.
    """
    total = 0
    ranks = {s.site: k for s in plan.by_site.values() for m, k in s.chain if m in ("low-rank", "pca-tables")}
    narrower: dict[str, int] = {}
    gone = _gone(sites, plan)
    shared = {part for name in ranks for part in parts(sites[name])} - set(ranks)
    for name, site in sites.items():
        rank, count = ranks.get(name), rows.get(name, 0)
        if rank is None or not isinstance(site, Table):
            continue
        for node in site.nodes:
            layers = folded.get(node.output[0])
            total += 0 if layers else count // len(site.nodes) * rank * site.shape[1]
            for read in layers or ():
                narrower[read] = narrower.get(read, 0) + site.shape[1] - rank
    for name, site in sites.items():
        rank = ranks.get(name)
        if isinstance(site, Product if rank is None else Layer) and name not in shared:
            count = rows.get(site.members[0].name, 0)
            inner = site.shape[0] - narrower.get(site.inputs[0], 0) - gone.get(site.inputs[0], 0)
            outer = site.shape[1] - sum(gone.get(p.name, 0) for p in site.members)
            total += count * (inner * outer if rank is None else rank * (inner + outer))
    return total


def _gone(sites: Mapping[str, Site], plan: Plan) -> dict[str, int]:
    """How many units went, by the name of the layer that gave them and by the tensor that others read."""
    out: dict[str, int] = {}
    for step in plan.by_site.values():
        site = sites[step.site]
        if isinstance(site, Hidden):
            out[site.layer.name] = out[site.tensor] = site.width - step.chain[0][1]
    return out
