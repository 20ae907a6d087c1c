"""A model under change: its constants, products and tables, and small changes to its graph.

`Network` holds a copy of the model, functions inlined. Packing and the methods of `compress` ask it what reads and what
gives a tensor, and have it put other nodes in the place of one. Nothing is looked up by the spelling of a name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxrank.graphs import attribute, captured, claimed, live, names_in, subgraphs, versions
from onnxrank.model import flattened, overridable, tensor_data
from onnxrank.operators import operator
from onnxrank.plans import label

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
METHOD = "onnxrank.compress"
"""Key, in a node's metadata, of the method that made it."""


@dataclass(frozen=True)
class Bias:
    """A constant vector that is added to what a product gives.

    Attributes:
        node: The node that adds it: the product itself, or the addition behind it.
        place: Which input of that node it is.
    """

    node: NodeProto
    place: int


@dataclass(frozen=True)
class Product:
    """A product with a constant matrix, at every node that reads the matrix.

    Attributes:
        name: The first node's name, which is what `--sites` matches.
        weight: The matrix's tensor.
        shape: Inputs and outputs of the layer.
        nodes: The products.
        flipped: Whether the matrix is stored outputs first.
    """

    name: str
    weight: str
    shape: tuple[int, int]
    nodes: tuple[NodeProto, ...]
    flipped: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the products give, biases of Gemm included."""
        return tuple(n.output[0] for n in self.nodes)

    @property
    def inputs(self) -> tuple[str, ...]:
        """What is multiplied."""
        return tuple(n.input[0] for n in self.nodes)

    @property
    def members(self) -> tuple[Product, ...]:
        """The layer itself, as those of a `Joint`."""
        return (self,)


@dataclass(frozen=True)
class Joint:
    """Layers that read the same tensors, as queries, keys and values do, as one layer.

    Attributes:
        members: The layers, in the graph's order; their outputs lie side by side in that order.
    """

    members: tuple[Product, ...]

    @property
    def name(self) -> str:
        """The layers' names."""
        return " + ".join(p.name for p in self.members)

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs, and outputs of all layers together."""
        return self.members[0].shape[0], sum(p.shape[1] for p in self.members)

    @property
    def wide(self) -> bool:
        """Whether the layers give at least as many columns together as they read: else a basis for all saves little."""
        return self.shape[0] <= self.shape[1]

    @property
    def nodes(self) -> tuple[NodeProto, ...]:
        """The products of all layers."""
        return tuple(n for p in self.members for n in p.nodes)

    @property
    def inputs(self) -> tuple[str, ...]:
        """What is multiplied, by each of the layers."""
        return self.members[0].inputs


@dataclass(frozen=True)
class Table:
    """An embedding table: a constant whose rows are looked up.

    Attributes:
        name: The first lookup's name, which is what `--sites` matches.
        weight: The table's tensor.
        shape: Rows and width.
        nodes: The lookups.
    """

    name: str
    weight: str
    shape: tuple[int, int]
    nodes: tuple[NodeProto, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """What is looked up."""
        return tuple(n.input[1] for n in self.nodes)


@dataclass(frozen=True)
class Hidden:
    """The units between a layer and those that read it.

    Attributes:
        layer: The layer that gives them.
        readers: All that reads them.
    """

    layer: Product
    readers: tuple[Product, ...]

    @property
    def name(self) -> str:
        """What `--sites` matches."""
        return f"units of {self.layer.name}"

    @property
    def width(self) -> int:
        """How many there are."""
        return self.layer.shape[1]

    @property
    def tensor(self) -> str:
        """What the readers read."""
        return self.readers[0].inputs[0]

    @property
    def nodes(self) -> tuple[NodeProto, ...]:
        """The products of the layers that read them."""
        return tuple(n for p in self.readers for n in p.nodes)


Layer = Product | Joint
Single = Product | Table
"""What has one constant."""
Site = Layer | Table | Hidden


class Network:
    """A model under change.

    Args:
        model: The model; it is copied.
        folder: Where its external data lies.
        inside: Whether external data is read into the copy; else a tensor is read when it is asked for.
        key: Key, in the metadata of nodes that are made, of what made them.
    """

    def __init__(
        self,
        model: ModelProto,
        folder: str | os.PathLike[str] | None = None,
        inside: bool = True,
        key: str = METHOD,
    ) -> None:
        self._folder, self._key = folder, key
        source = live(flattened(model))
        self._taken = names_in(source.graph)
        self._replaceable = overridable(source)
        self.model = without_constants(source)
        self.nodes = list(self.model.graph.node)
        # Those of the model itself, which are never changed: they may be most of it.
        self.tensors = [_read(t, folder) if inside else t for t in source.graph.initializer]
        self._resized: set[str] = set()
        self._arrays: dict[str, NDArray[Any]] = {}
        self._index()

    def copy(self) -> Network:
        """Another one, to be changed on its own."""
        return Network(self.finished())

    def _index(self) -> None:
        self._held = {t.name: t for t in self.tensors if t.name not in self._replaceable}
        self.maker = {o: n for n in self.nodes for o in n.output if o}
        self.readers: dict[str, list[NodeProto]] = {}
        self.inner: set[str] = set()
        for n in self.nodes:
            for i in dict.fromkeys(n.input):
                self.readers.setdefault(i, []).append(n)
            for g in subgraphs(n):
                self.inner |= captured(g)
        self.outputs = {o.name for o in self.model.graph.output}

    # --- what is there ----------------------------------------------------------------------------------------

    def array(self, name: str) -> NDArray[Any] | None:
        """A constant: an initializer, a Constant, or one of them transposed, cast or passed on; None for others."""
        if name in self._arrays:
            return self._arrays[name]
        found = self._folded(name)
        if found is not None:
            self._arrays[name] = found
        return found

    def _folded(self, name: str) -> NDArray[Any] | None:
        if name in self._held:
            return tensor_data(self._held[name], self._folder)
        node = self.maker.get(name)
        if node is None:
            return None
        if operator(node) == "Constant":
            a = node.attribute[0]
            if a.name == "value":
                return tensor_data(a.t)
            if a.name in ("value_float", "value_floats"):
                return np.array(helper.get_attribute_value(a), np.float32)
            return np.array(helper.get_attribute_value(a), np.int64) if a.name in ("value_int", "value_ints") else None
        if operator(node) in ("Transpose", "Identity", "Cast"):
            inner = self.array(node.input[0])
            if inner is None or operator(node) == "Identity":
                return inner
            if operator(node) == "Cast":
                to = attribute(node, "to")
                return inner.astype(helper.tensor_dtype_to_np_dtype(to)) if to in FLOATS else None
            return np.transpose(inner, attribute(node, "perm"))
        return None

    def stored(self, name: str) -> TensorProto | None:
        """An initializer that callers cannot replace; None for others."""
        return self._held.get(name)

    def stack(self, names: Sequence[str], hint: str) -> str:
        """Adds an initializer whose rows are those of others, one below the other, and returns its name."""
        parts = [self._held[name] for name in names]
        tensor = TensorProto(name=self.fresh(hint), data_type=parts[0].data_type)
        tensor.dims.extend([sum(t.dims[0] for t in parts), *parts[0].dims[1:]])
        tensor.raw_data = b"".join(t.raw_data or numpy_helper.from_array(tensor_data(t)).raw_data for t in parts)
        self.tensors.append(tensor)
        self._held[tensor.name] = tensor
        return tensor.name

    def _entries(self, name: str) -> int:
        """Number of entries of the initializer that a tensor is, or is made of; 0 where it is made of none."""
        while name not in self._held:
            node = self.maker.get(name)
            if node is None or operator(node) not in ("Transpose", "Identity", "Cast"):
                return 0
            name = node.input[0]
        return math.prod(self._held[name].dims)

    def alone(self, tensor: str) -> NodeProto | None:
        """The only node that reads a tensor, once; None where there are others, or callers or inner graphs read it."""
        readers = self.readers.get(tensor, [])
        if len(readers) != 1 or tensor in self.outputs or tensor in self.inner:
            return None
        return readers[0] if list(readers[0].input).count(tensor) == 1 else None

    def weights(self) -> int:
        """Number of entries that are multiplied with, none of which has to be read for it."""
        operands = {n.input[1] for n in self.nodes if operator(n) in ("MatMul", "Gemm") and len(n.input) > 1}
        return sum(map(self._entries, operands))

    def products(self) -> list[Product]:
        """All products of computed values with constant matrices, in the graph's order."""
        found: dict[str, list[NodeProto]] = {}
        for n in self.nodes:
            if operator(n) in ("MatMul", "Gemm") and len(n.input) > 1:
                if self._is_layer(n):
                    found.setdefault(n.input[1], []).append(n)
        out = []
        for weight, nodes in found.items():
            data = self.array(weight)
            assert data is not None
            flips = {bool(attribute(n, "transB")) for n in nodes}
            if len(flips) == 1:
                (flipped,) = flips
                rows, columns = data.shape[::-1] if flipped else data.shape
                out.append(Product(label(nodes[0]), weight, (rows, columns), tuple(nodes), flipped))
        return _distinct(out)

    def _is_layer(self, node: NodeProto) -> bool:
        data = self.array(node.input[1])
        if data is None or data.ndim != 2 or data.dtype not in (np.float32, np.float64):
            return False
        if self.array(node.input[0]) is not None:
            return False
        plain = [("alpha", 1.0), ("beta", 1.0)]
        return operator(node) == "MatMul" or (
            not attribute(node, "transA") and all(attribute(node, k, v) == v for k, v in plain)
        )

    def tables(self, most: int | None = None) -> list[Table]:
        """All constants whose rows computed ids look up, in the graph's order.

        Args:
            most: Entries above which a table is left where it is, unread.
        """
        found: dict[str, list[NodeProto]] = {}
        other: set[str] = set()
        for n in self.nodes:
            if most is not None and operator(n) == "Gather" and self._entries(n.input[0]) > most:
                continue
            if operator(n) == "Gather" and not attribute(n, "axis"):
                data = self.array(n.input[0])
                if data is not None and data.ndim == 2 and self.array(n.input[1]) is None:
                    if data.dtype in (np.float32, np.float64):
                        found.setdefault(n.input[0], []).append(n)
                        continue
            other.update(n.input)
        other |= self.outputs | self.inner
        return _distinct(
            [
                Table(label(nodes[0]), weight, self.array(weight).shape, tuple(nodes))  # type: ignore[union-attr]
                for weight, nodes in found.items()
                if weight not in other
            ]
        )

    def joints(self, least: int = 1) -> list[Joint]:
        """Layers of at least so many inputs and outputs that read the same tensors."""
        by_inputs: dict[tuple[str, ...], list[Product]] = {}
        for p in self.products():
            if min(p.shape) >= least:
                by_inputs.setdefault(p.inputs, []).append(p)
        return [Joint(tuple(several)) for several in by_inputs.values() if len(several) > 1]

    def matrix(self, site: Layer) -> NDArray[Any]:
        """A layer's weights `[inputs, outputs]`."""
        several = []
        for p in site.members:
            data = self.array(p.weight)
            assert data is not None
            several.append(data.T if p.flipped else data)
        return several[0] if len(several) == 1 else np.concatenate(several, axis=1)

    def adds_computed(self, site: Layer) -> bool:
        """Whether a node of a layer adds what is computed itself, as candidate-level parts of divided layers do."""
        return any(
            operator(n) == "Gemm" and len(n.input) > 2 and n.input[2] and self.array(n.input[2]) is None
            for n in site.nodes
        )

    def bias(self, node: NodeProto, width: int) -> Bias | None:
        """The constant vector that is added to what a product gives, where nothing else reads it before."""
        if operator(node) == "Gemm" and len(node.input) > 2 and node.input[2]:
            return Bias(node, 2) if self._is_vector(node.input[2], width) else None
        after = self.alone(node.output[0])
        if after is None or operator(after) != "Add":
            return None
        place = 1 - list(after.input).index(node.output[0])
        return Bias(after, place) if self._is_vector(after.input[place], width) else None

    def _is_vector(self, name: str, width: int) -> bool:
        data = self.array(name)
        return data is not None and data.size == width and data.shape[-1:] == (width,)

    # --- changes ----------------------------------------------------------------------------------------------

    def fresh(self, hint: str) -> str:
        """A name that nothing has yet."""
        return claimed(hint, self._taken, "_", 1)

    def constant(self, data: NDArray[Any], hint: str) -> str:
        """Adds an initializer and returns its name."""
        name = self.fresh(hint)
        tensor = numpy_helper.from_array(np.ascontiguousarray(data), name)
        self.tensors.append(tensor)
        self._held[name] = tensor
        return name

    def node(self, method: str, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
        """Makes a node that says which method made it; `replace` puts it into the graph."""
        domain = attributes.pop("domain", "")
        made = helper.make_node(op, inputs, outputs, self.fresh(f"{outputs[0]}/{op}"), domain=domain, **attributes)
        made.metadata_props.add(key=self._key, value=method)
        return made

    def replace(self, old: NodeProto, made: Sequence[NodeProto]) -> None:
        """Puts nodes in the place of one; the last of them gives what it gave."""
        place = next(k for k, n in enumerate(self.nodes) if n is old)
        self.nodes[place : place + 1] = made
        self.renewed()

    def renewed(self) -> None:
        """Looks at the nodes again, after inputs of theirs were changed in place."""
        self._arrays.clear()
        self._index()

    def resized(self, tensors: Iterable[str]) -> None:
        """Says that tensors have another width now than the file declares."""
        self._resized.update(tensors)

    def set_bias(self, bias: Bias, data: NDArray[Any]) -> None:
        """Has another vector added."""
        node = bias.node
        old = self.array(node.input[bias.place])
        assert old is not None
        node.input[bias.place] = self.constant(data.reshape(old.shape).astype(old.dtype), f"{node.output[0]}.bias")
        self.renewed()

    def add_bias(self, node: NodeProto, data: NDArray[Any], method: str) -> None:
        """Has a vector added behind a product that has none."""
        given, inner = node.output[0], self.fresh(f"{node.output[0]}.plain")
        vector = self.constant(data, f"{given}.bias")
        node.output[0] = inner
        self.replace(node, [node, self.node(method, "Add", [inner, vector], [given])])

    def set_matrix(self, site: Product, matrix: NDArray[Any]) -> None:
        """Gives a layer other weights `[inputs, outputs]`, which are kept in as many bits as those before."""
        data = matrix.T if site.flipped else matrix
        cast = self.maker.get(site.nodes[0].input[1])
        stored = self.array(cast.input[0]) if cast is not None and operator(cast) == "Cast" else None
        stored = stored if stored is not None and stored.dtype.kind == "f" else None
        name = self.constant(data if stored is None else data.astype(stored.dtype), f"{site.weight}.packed")
        if cast is not None and stored is not None:  # as `fp16` leaves them
            wide = NodeProto()
            wide.CopyFrom(cast)
            wide.name, wide.input[0], wide.output[0] = self.fresh(cast.name), name, self.fresh(f"{name}.wide")
            self.nodes.insert(0, wide)
            name = wide.output[0]
        for node in site.nodes:
            node.input[1] = name
        self.renewed()

    def shift(self, site: Product, vector: NDArray[np.float64], method: str) -> None:
        """Has a vector `[outputs]` added to what a layer of one node gives, in its bias if it has one."""
        (node,) = site.nodes
        if not np.abs(vector).max() > 0:
            return
        held = self.bias(node, site.shape[1])
        kind = self.matrix(site).dtype
        if held is not None:
            old = self.array(held.node.input[held.place])
            assert old is not None
            self.set_bias(held, old.astype(np.float64).reshape(-1) + vector)
        elif operator(node) == "Gemm" and (len(node.input) < 3 or not node.input[2]):
            del node.input[2:]
            node.input.append(self.constant(vector.astype(kind), f"{node.output[0]}.bias"))
            self.renewed()
        else:
            self.add_bias(node, vector.astype(kind), method)

    def uses(self, domain: str, version: int) -> None:
        """Says that operators of a domain are used."""
        if all(o.domain != domain for o in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(domain, version))

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return versions(self.model)[""]

    def finished(self) -> ModelProto:
        """The model without what nothing reads any more."""
        whole = ModelProto()
        whole.CopyFrom(self.model)
        del whole.graph.node[:]
        whole.graph.node.extend(self.nodes)
        out = live(whole)
        read = {i for n in out.graph.node for i in n.input} | {o.name for o in out.graph.output} | self.inner
        listed = {i.name for i in out.graph.input}
        out.graph.initializer.extend(t for t in self.tensors if t.name in read or t.name in listed)
        made = {o for n in out.graph.node for o in n.output} - self._resized
        known = [v for v in out.graph.value_info if v.name in made]
        if len(known) < len(out.graph.value_info):
            del out.graph.value_info[:]
            out.graph.value_info.extend(known)
        return out


def made_by(node: NodeProto, method: str) -> bool:
    """Whether a method of `compress` made a node."""
    return any(p.key == METHOD and p.value == method for p in node.metadata_props)


def without_constants(model: ModelProto) -> ModelProto:
    """A copy of a model without its initializers, which may be most of it."""
    out = ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            for inner, part in value.ListFields():
                if inner.name != "initializer":
                    _put(out.graph, inner, part)
        else:
            _put(out, field, value)
    return out


def _put(message: Any, field: Any, value: Any) -> None:
    """Sets a field of a message to a copy."""
    if isinstance(value, (str, bytes, int, float)):
        setattr(message, field.name, value)
    elif hasattr(value, "CopyFrom"):
        getattr(message, field.name).CopyFrom(value)
    else:
        getattr(message, field.name).extend(value)


def _read(t: TensorProto, folder: str | os.PathLike[str] | None) -> TensorProto:
    """A tensor whose data is its own."""
    return numpy_helper.from_array(tensor_data(t, folder), t.name) if t.data_location == TensorProto.EXTERNAL else t


def parameters(model: ModelProto) -> int:
    """Number of floats and quantised numbers among the constants: all but indices."""
    held = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.STRING)
    kept = [t for t in model.graph.initializer if t.data_type not in held]
    return sum(int(np.prod(t.dims)) for t in kept)


def _distinct(sites: list[Any]) -> list[Any]:
    """Sites with names of their own: further ones of a name get a number."""
    seen: dict[str, int] = {}
    out = []
    for s in sites:
        seen[s.name] = seen.get(s.name, 0) + 1
        out.append(s if seen[s.name] == 1 else replace(s, name=f"{s.name}#{seen[s.name]}"))
    return out
