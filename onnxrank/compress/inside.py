"""What the process that runs models does for `compress`: scores of kept requests, sums over what layers give, times."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from onnxrank import runtime
from onnxrank.compress.statistics import Moments, counted
from onnxrank.turns import interleave

if TYPE_CHECKING:
    from onnxrank.compress.finetune import Tuner

Feed = Mapping[str, NDArray[Any]]
_TUNED = "tuned"


class Inside:
    """Sessions, requests that are kept, and sums, by key.

    Args:
        models: Models of the process, by key, with the folders of their external data.
    """

    def __init__(self, models: Mapping[str, tuple[ModelProto, str | None]]) -> None:
        self._models = models
        self._sessions: dict[str, Any] = {}
        self._kept: dict[str, list[Feed]] = {}
        self._sums: dict[str, Any] = {}
        self._tuner: Tuner | None = None

    def keep(self, name: str, feeds: Sequence[Feed]) -> None:
        """Keeps further requests under a name."""
        self._kept.setdefault(name, []).extend(feeds)

    def forget(self, session: str) -> None:
        """Closes a session."""
        self._sessions.pop(session, None)

    def open(self, session: str, key: str, expose: Sequence[str] = (), optimise: bool = True) -> None:
        """Makes a session.

        Args:
            session: Its key.
            key: The model.
            expose: Further tensors that it gives.
            optimise: Whether onnxruntime's own graph optimisations run.
        """
        model, folder = self._models[key]
        if expose:
            shown = ModelProto()
            shown.CopyFrom(model)
            have = {v.name for v in (*shown.graph.output, *shown.graph.input)}
            shown.graph.output.extend(
                helper.make_empty_tensor_value_info(n) for n in dict.fromkeys(expose) if n not in have
            )
            model = shown
        self._sessions[session] = runtime.session(model, folder, optimise=optimise)

    def scores(
        self, session: str, names: Sequence[str], kept: str | None = None, feeds: Sequence[Feed] = ()
    ) -> dict[str, NDArray[Any]]:
        """Outputs of all requests, one behind the other, each row flat.

        Args:
            session: The session's key.
            names: Which outputs.
            kept: Name of requests that were kept.
            feeds: Or requests.
        """
        given = feeds if kept is None else self._kept[kept]
        made: dict[str, list[NDArray[Any]]] = {n: [] for n in names}
        for feed in given:
            for name, value in self._run(session, feed, names).items():
                made[name].append(value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1))
        return {n: np.concatenate(v) for n, v in made.items()}

    def add(
        self,
        session: str,
        feeds: Sequence[Feed],
        products: Mapping[str, Sequence[str]],
        lookups: Mapping[str, Sequence[Any]],
        outputs: Sequence[str],
    ) -> dict[str, NDArray[Any]]:
        """Adds requests to the sums.

        Args:
            session: A session that gives the tensors below.
            feeds: The requests.
            products: Per sum the tensors of which moments are taken.
            lookups: Per sum the tensors of ids, and the number of rows of the table.
            outputs: Names of outputs to return.
        """
        tensors = dict.fromkeys([t for ts in products.values() for t in ts])
        ids = dict.fromkeys([t for ts, _ in lookups.values() for t in ts])
        made: dict[str, list[NDArray[Any]]] = {n: [] for n in outputs}
        for feed in feeds:
            out = self._run(session, feed, [*tensors, *ids, *(o for o in outputs if o not in tensors)])
            for site, names in products.items():
                for name in names:
                    found = Moments.of(out[name])
                    self._sums[site] = self._sums[site] + found if site in self._sums else found
            for site, (names, rows) in lookups.items():
                for name in names:
                    self._sums[site] = self._sums.get(site, 0) + counted(out[name], rows)
            for name in outputs:
                made[name].append(out[name].reshape(len(out[name]), -1))
        return {n: np.concatenate(v) for n, v in made.items() if v}

    def collected(self) -> dict[str, Any]:
        """The sums so far, which are forgotten: moments as count, total and squares, lookups as counts."""
        out = {
            k: {"count": v.count, "total": v.total, "squares": v.squares} if isinstance(v, Moments) else v
            for k, v in self._sums.items()
        }
        self._sums = {}
        return out

    def depths(self, session: str, feed: Feed, names: Sequence[str]) -> dict[str, list[int]]:
        """Shapes of tensors on one request."""
        return {n: list(v.shape) for n, v in self._run(session, feed, names).items()}

    def crossed(
        self, seen: str, wanted: str, kept: str, x: Sequence[str], y: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        """Moments of what a layer of one model sees, and with what that of another gives, over kept requests.

        Args:
            seen: Session of the model that is being fitted.
            wanted: Session of the model that is right.
            kept: Name of the requests.
            x: Inputs of the layer in the first, by node.
            y: Its outputs in the second, by node; of layers that read the same, those of each.
        """
        inner = outer = None
        both: Any = 0.0
        for feed in self._kept[kept]:
            a = self._run(seen, feed, list(dict.fromkeys(x)))
            b = self._run(wanted, feed, list(itertools.chain.from_iterable(y)))
            for one, others in zip(x, y, strict=True):
                p = a[one].reshape(-1, a[one].shape[-1]).astype(np.float64)
                q = np.concatenate([b[t].reshape(len(p), -1).astype(np.float64) for t in others], axis=1)
                mine, its = Moments.of(p), Moments.of(q)
                inner = mine if inner is None else inner + mine
                outer = its if outer is None else outer + its
                both = both + p.T @ q
        assert inner is not None and outer is not None
        return {
            "seen": {"count": inner.count, "total": inner.total, "squares": inner.squares},
            "wanted": {"count": outer.count, "total": outer.total, "squares": outer.squares},
            "both": both,
        }

    def prepare(
        self, key: str, sites: Sequence[Mapping[str, Any]], outputs: Sequence[str], **how: Any
    ) -> dict[str, Any]:
        """Makes ready to train the factors of a model.

        Args:
            key: The model.
            sites: Its layers of low rank, as `finetune.Factors` has them.
            outputs: Names of the scores.
            how: Further arguments of `finetune.Tuner`.

        Returns:
            Names of the layers that are trained, and by which operator others are not.
        """
        from onnxrank.compress.finetune import Factors, Tuner

        self._tuner = Tuner(self._models[key][0], [Factors(**s) for s in sites], outputs, **how)
        cone = self._tuner.cone
        self.open(_TUNED, key, cone.fed, optimise=False)
        self._tuned = False
        return {"sites": [s.name for s in cone.sites], "refused": cone.refused}

    def tune(self, original: str, feeds: Sequence[Feed], labels: Mapping[str, NDArray[np.float64]]) -> float:
        """Trains a step on some requests; returns the loss.

        Args:
            original: Session of the original.
            feeds: The requests.
            labels: Labels of all their rows, by output.
        """
        tuner = self._tuner
        assert tuner is not None
        cone, several, right = tuner.cone, [], []
        for feed in feeds:
            made = self._run(_TUNED, feed, [*cone.fed, *cone.outputs])
            several.append({n: made[n] for n in cone.fed})
            right.append(made)
        if not self._tuned:
            tuner.check(several[0], right[0])
            self._tuned = True
        scores = self.scores(original, cone.outputs, feeds=feeds)
        return tuner.step(several, {n: v[:, 0].astype(np.float64) for n, v in scores.items()}, labels)

    def tuned(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """What was trained, by layer; forgets how."""
        assert self._tuner is not None
        found, self._tuner = self._tuner.found(), None
        self.forget(_TUNED)
        return found

    def _run(self, session: str, feed: Feed, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Some tensors of a session, inputs among them."""
        asked = [n for n in names if n not in feed]
        # onnxruntime itself gives all outputs where none are named.
        made = runtime.run(self._sessions[session], feed, asked) if asked else {}
        return {n: feed[n] if n in feed else made[n] for n in names}

    def race(self, sessions: Sequence[str], feed: Feed, seconds: float) -> NDArray[np.float64]:
        """Times sessions in turns on one request.

        A session has one thread, and that thread's own time is counted: what else the machine does must not decide what
        is done to a model.

        Returns:
            Seconds per run, `[sessions, rounds, runs of a turn]`.
        """

        def timed(session: Any) -> Callable[[int], float]:
            given = runtime.typed(session, feed)

            def run(turn: int) -> float:
                start = time.thread_time()
                session.run(None, given)
                return time.thread_time() - start

            return run

        try:
            return interleave([timed(self._sessions[s]) for s in sessions], seconds).seconds
        except Exception as e:
            raise runtime.failed_run(e) from e


DO: dict[str, Callable[..., Any]] = {
    do.__name__: do
    for do in (
        Inside.keep, Inside.forget, Inside.open, Inside.scores, Inside.add, Inside.collected, Inside.depths,
        Inside.crossed, Inside.race, Inside.prepare, Inside.tune, Inside.tuned,
    )
}  # fmt: skip
"""What may be asked for."""
