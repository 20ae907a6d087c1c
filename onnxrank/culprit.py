"""Which node of a model the runtime dies of."""

from __future__ import annotations

import os
import time

from onnx import ModelProto, helper

from onnxrank.errors import ModelError
from onnxrank.graphs import live
from onnxrank.workers import Crashed, Feeds, RemoteSession

_SECONDS = 30.0


def culprit(
    model: ModelProto,
    folder: str | os.PathLike[str] | None,
    feeds: Feeds,
    *,
    optimise: bool = False,
    seconds: float = _SECONDS,
) -> str | None:
    """Finds the first node that a model must not get to: the head of the model up to it kills its process.

    Args:
        model: The model, functions inlined, in topological order.
        folder: Where its external data lies.
        feeds: Inputs that it dies of.
        optimise: Whether onnxruntime's own graph optimisations run.
        seconds: How long to look.

    Returns:
        The node's operator and name; None where its death cannot be repeated, or the time was too short.
    """
    model = live(model)
    end = time.monotonic() + seconds

    def dies(count: int) -> bool:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        try:
            with RemoteSession(_head(model, count), folder, optimise=optimise, timeout=left) as session:
                session.run(feeds)
        except Crashed as e:
            return e.kind == "crash"
        except ModelError:
            pass
        return False

    low, high = 0, len(model.graph.node)  # lives with so many nodes, dies with so many
    try:
        if not high or not dies(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if dies(middle) else (middle, high)
    except TimeoutError:
        return None
    node = model.graph.node[low]
    return f"{node.op_type} {node.name or next((o for o in node.output if o), '')}".strip()


def _head(model: ModelProto, count: int) -> ModelProto:
    """A model of the first nodes of another; what they leave unread are its outputs."""
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[count:], out.graph.output[:]
    given = {o.name: o for o in model.graph.output}
    made = [o for n in out.graph.node for o in n.output if o]
    read = {i for n in out.graph.node for i in n.input}
    for name in made:
        if name in given:
            out.graph.output.append(given[name])
        elif name not in read:
            out.graph.output.append(helper.make_empty_tensor_value_info(name))
    return out
