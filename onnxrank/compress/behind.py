"""What is done to layers of low rank behind the search: they are fitted to what they see, and trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxrank.compress.low_rank import fitted
from onnxrank.compress.plan import Step, Tuning
from onnxrank.compress.report import Refusal
from onnxrank.compress.requests import Batch
from onnxrank.compress.search import Made, Search
from onnxrank.compress.sites import gemm_bias, layer
from onnxrank.compress.statistics import Fitted, reduced_rank
from onnxrank.network import Hidden, Site, Table


def sequential(search: Search, made: Made) -> Made:
    """Fits layers of low rank to what they see in the compressed model, one behind the other.

    Args:
        search: The search that made it.
        made: The model.

    Returns:
        The better of the two models.
    """
    low = {s.site: s for s in made.plan.by_site.values() if s.chain[0][0] == "low-rank"}
    order = [n for n, s in search.all.items() if n in low and not search.base.adds_computed(layer(s))]
    place = {id(n): k for k, n in enumerate(search.base.nodes)}
    order.sort(key=lambda n: min(place[id(node)] for node in search.all[n].nodes))
    maps: dict[str, Fitted] = {}
    with search.runner.session(
        search.base.finished(), [t for n in order for ts in _tensors(search, n)[1] for t in ts]
    ) as right:
        for name in order:
            x, y = _tensors(search, name)
            search.say(f"fitting {name} to what it sees")
            model = search.build(made.plan, replace(search.stats, maps=maps)).finished()
            with search.runner.session(model, x) as session:
                seen, wanted, both = search.runner.crossed(session, right, x, y)
            vector = gemm_bias(search.base, layer(search.all[name]))
            if vector is not None:
                both = both - np.outer(seen.total, vector)
                wanted = wanted.less(vector)
            maps[name] = reduced_rank(seen, both, wanted, low[name].chain[0][1])
    better = search.made(replace(made.plan, sequential=True, refit=False), replace(search.stats, maps=maps))
    return replace(better, maps=maps) if better.error < made.error and search.passes(better) else made


def finetuned(search: Search, made: Made, how: Tuning, batches: Iterable[Batch], steps: int) -> Made:
    """Trains the layers of low rank; what else is done to layers is done behind that.

    Args:
        search: The search that made it.
        made: The model.
        how: How.
        batches: Small batches of calibration rows, as often as they are wanted.
        steps: About how many those are.

    Returns:
        The better of the two models.
    """
    stats = replace(search.stats, maps=made.maps)
    first = {s.site: replace(s, chain=s.chain[:1]) for s in made.plan.by_site.values() if _trained(s)}
    others = [s for s in made.plan.by_site.values() if isinstance(search.all[s.site], (Table, Hidden))]
    left: dict[str, list[Site]] = {}
    net = search.build(replace(made.plan, steps=(*others, *first.values())), stats, left)
    several = {name: _factors(left[name]) for name in first}
    named = {"steps": steps, "relu": how.relu, "seed": how.seed}
    sites = [f for fs in several.values() for f in fs]
    kept, refused = search.runner.prepare(net.finished(), sites, search.kept.outputs, **named)
    for name, fs in several.items():
        odd = [refused[f["name"]] for f in fs if f["name"] in refused]
        search.refusals += [Refusal(name, "finetune", f"torch does not run {op} here") for op in odd[:1]]
    if not kept:
        return made
    for k, batch in enumerate(batches):
        labels = {} if batch.labels is None else dict(zip(search.kept.outputs, batch.labels.T, strict=False))
        loss = search.runner.tune(batch, labels)
        search.say(f"training {len(kept)} layers: step {k + 1} of {steps}, loss {loss:.4f}")
    maps, tuned = dict(made.maps), search.runner.tuned()
    for name, fs in several.items():
        trained = [tuned[f["name"]] for f in fs if f["name"] in tuned]
        if trained:
            before = fitted(search.base, layer(search.all[name]), first[name].chain[0][1], stats)
            second, shift = (np.concatenate([t[part] for t in trained], axis=-1) for part in ("second", "shift"))
            lift = trained[0].get("lift")
            maps[name] = Fitted(before.rank, trained[0]["first"], second, before.shift + shift, lift)
    better = search.made(replace(made.plan, finetune=how, refit=False), replace(stats, maps=maps))
    better = replace(better, maps=maps)
    passes = search.passes(better) or not search.passes(made)
    return better if passes and better.standing > made.standing else made


def _tensors(search: Search, name: str) -> tuple[list[str], list[list[str]]]:
    """What a layer reads, by node, and what it gives there, by the layers that it consists of."""
    site = layer(search.all[name])
    return list(site.inputs), [list(ts) for ts in zip(*(p.outputs for p in site.members), strict=True)]


def _factors(sites: Sequence[Site]) -> list[dict[str, Any]]:
    """A layer of low rank, as `finetune.Factors` has it: one for each of several that share their first factor."""
    one, *others = (layer(s).members[0] for s in sites)
    inner = [n.output[0] for n in one.nodes]
    return [
        {"name": p.name, "first": one.weight, "second": p.weight, "inner": inner, "outer": list(p.outputs)}
        for p in others
    ]


def _trained(step: Step) -> bool:
    """Whether a step leaves factors that can be trained."""
    return step.chain[0][0] == "low-rank"
