"""Tables and layers in fewer bytes: half precision, and whole numbers with scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.compress.method import Method, Refused, distance, float_type, lookups
from onnxrank.compress.statistics import Statistics
from onnxrank.network import Network, Product, Single, Site, Table

_LARGEST_HALF = 65504.0
_TABLE = 127
_LAYER = 63
"""Largest whole numbers. Two products of 255 and 63 fit into 16 bits, so that no kernel of any processor saturates."""
_SMALL = 256
"""Entries of a constant below which fewer bytes are not worth a node."""


def _half_offers(net: Network, site: Single, stats: Statistics) -> Sequence[int]:
    data = net.array(site.weight)
    assert data is not None
    if data.size < _SMALL:
        raise Refused(f"{data.size} entries are too few to be worth a node")
    if np.abs(data).max(initial=0) > _LARGEST_HALF:
        raise Refused("entries beyond 65504 do not fit into 16 bits")
    return [0]


def _half_table(net: Network, site: Table, _: int, stats: Statistics) -> list[Site]:
    """`Cast(Gather(half(D), ids))`."""
    data = net.array(site.weight)
    assert data is not None
    name = net.constant(data.astype(np.float16), f"{site.weight}.half")
    for node in site.nodes:
        inner = net.fresh(f"{node.output[0]}.half")
        look = net.node("fp16-tables", "Gather", [name, node.input[1]], [inner], axis=0)
        net.replace(node, [look, net.node("fp16-tables", "Cast", [inner], node.output, to=float_type(data))])
    return []


def _half_layer(net: Network, site: Product, _: int, stats: Statistics) -> list[Site]:
    """`x Cast(half(W))`; onnxruntime casts once, when the model is loaded."""
    data = net.array(site.weight)
    assert data is not None
    name = net.constant(data.astype(np.float16), f"{site.weight}.half")
    wide = net.fresh(f"{site.weight}.wide")
    for k, node in enumerate(site.nodes):
        made = _copied(node)
        made.input[1] = wide
        net.replace(node, [*([net.node("fp16", "Cast", [name], [wide], to=float_type(data))] if k == 0 else []), made])
    return []


def _copied(node: NodeProto) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    return made


def _half_error(net: Network, site: Single, _: int, stats: Statistics) -> float:
    data = net.array(site.weight)
    assert data is not None
    return distance(data, data.astype(np.float16), lookups(site, stats))


def _int8_table_offers(net: Network, site: Table, stats: Statistics) -> Sequence[int]:
    data = net.array(site.weight)
    assert data is not None
    if data.size < _SMALL or site.shape[0] < 32:
        raise Refused(f"{site.shape[0]} rows are too few to be worth scales")
    if net.opset < 13:
        raise Refused(f"scales per column need opset 13, and the model has {net.opset}")
    return [0]


def column_scales(data: NDArray[Any], most: int) -> NDArray[np.float32]:
    """Scales of symmetric whole numbers up to `most` per column: of a few clippings the one with the least error."""
    largest = np.abs(data).max(axis=0).astype(np.float64)
    largest[largest == 0] = 1.0
    best, least = largest / most, np.full(largest.shape, np.inf)
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7):
        scale = share * largest / most
        off = ((np.clip(np.rint(data / scale), -most, most) * scale - data) ** 2).sum(axis=0)
        best, least = np.where(off < least, scale, best), np.minimum(least, off)
    return np.asarray(best.astype(np.float32))


def _quantised(data: NDArray[Any], scales: NDArray[np.float32], most: int) -> NDArray[np.int8]:
    return np.clip(np.rint(data / scales), -most, most).astype(np.int8)


def _int8_table(net: Network, site: Table, _: int, stats: Statistics) -> list[Site]:
    """`DequantizeLinear(Gather(int8(D), ids))`, a scale per column."""
    data = net.array(site.weight)
    assert data is not None
    if data.dtype != np.float32:
        raise Refused(f"a table of {data.dtype} is not quantised")
    scales = column_scales(data, _TABLE)
    name = net.constant(_quantised(data, scales, _TABLE), f"{site.weight}.int8")
    scale = net.constant(scales, f"{site.weight}.scale")
    zero = net.constant(np.zeros(site.shape[1], np.int8), f"{site.weight}.zero")
    for node in site.nodes:
        inner = net.fresh(f"{node.output[0]}.int8")
        look = net.node("int8-tables", "Gather", [name, node.input[1]], [inner], axis=0)
        axis = stats.depth(node.input[1])
        if axis is None:
            raise Refused("the number of axes of its ids is not known")
        wide = net.node("int8-tables", "DequantizeLinear", [inner, scale, zero], node.output, axis=axis)
        net.replace(node, [look, wide])
    return []


def _int8_table_error(net: Network, site: Table, _: int, stats: Statistics) -> float:
    data = net.array(site.weight)
    assert data is not None
    scales = column_scales(data, _TABLE)
    return distance(data, _quantised(data, scales, _TABLE) * scales, lookups(site, stats))


def _int8_offers(net: Network, site: Product, stats: Statistics) -> Sequence[int]:
    if site.shape[0] * site.shape[1] < 16 * _SMALL:
        raise Refused(f"a layer of {site.shape[0]} x {site.shape[1]} is too small to gain from whole numbers")
    data = net.array(site.weight)
    assert data is not None
    if data.dtype != np.float32:
        raise Refused(f"weights of {data.dtype} are not quantised")
    return [0]


def _int8(net: Network, site: Product, _: int, stats: Statistics) -> list[Site]:
    """`s_x (q(x) - z_x) q(W) s_W`: inputs quantised as they come, weights once, a scale per output."""
    weight = net.matrix(site)
    scales = column_scales(weight, _LAYER)
    name = net.constant(_quantised(weight, scales, _LAYER), f"{site.weight}.int8")
    scale = net.constant(scales, f"{site.weight}.scale")
    shared: dict[str, list[str]] = {}
    for node in site.nodes:
        y = node.output[0]
        made = []
        if node.input[0] not in shared:
            parts = [net.fresh(f"{y}.{part}") for part in ("q", "step", "zero")]
            shared[node.input[0]] = parts
            made.append(net.node("int8", "DynamicQuantizeLinear", [node.input[0]], parts))
        q, step, zero = shared[node.input[0]]
        whole, wide, both, plain = (net.fresh(f"{y}.{part}") for part in ("whole", "wide", "scale", "plain"))
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] else ""
        made += [
            net.node("int8", "MatMulInteger", [q, name, zero], [whole]),
            net.node("int8", "Cast", [whole], [wide], to=1),
            net.node("int8", "Mul", [step, scale], [both]),
            net.node("int8", "Mul", [wide, both], [plain if bias else y]),
        ]
        if bias:
            made.append(net.node("int8", "Add", [plain, bias], [y]))
        net.replace(node, made)
    return []


def _int8_fused(net: Network, site: Product, _: int, stats: Statistics) -> list[Site]:
    """The same as one operator of onnxruntime's own."""
    weight = net.matrix(site)
    scales = column_scales(weight, _LAYER)
    name = net.constant(_quantised(weight, scales, _LAYER), f"{site.weight}.int8")
    scale = net.constant(scales, f"{site.weight}.scale")
    zero = net.constant(np.zeros(site.shape[1], np.int8), f"{site.weight}.zero")
    net.uses("com.microsoft", 1)
    for node in site.nodes:
        given = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        bias = net.array(given) if given else None
        y = node.output[0]
        held = [given] if bias is not None and bias.shape == (site.shape[1],) else []
        plain = net.fresh(f"{y}.plain") if given and not held else y
        operands = [node.input[0], name, scale, zero, *held]
        made = [net.node("int8-fused", "DynamicQuantizeMatMul", operands, [plain], domain="com.microsoft")]
        if plain != y:
            made.append(net.node("int8-fused", "Add", [plain, given], [y]))
        net.replace(node, made)
    return []


def _int8_error(net: Network, site: Product, _: int, stats: Statistics) -> float:
    weight = net.matrix(site).astype(np.float64)
    scales = column_scales(weight, _LAYER)
    off = _quantised(weight, scales, _LAYER) * scales.astype(np.float64) - weight
    # Inputs are rounded to a 255th of their range, which a few outliers set: a percent, more or less.
    return math.sqrt(float((off**2).sum() / (weight**2).sum() or 1.0) + 1e-4)


FP16_TABLES = Method(
    "fp16-tables",
    "D[id] -> float(half(D)[id])",
    "half precision, rounded once; half the bytes at the same time",
    False, False, Table, _half_offers, _half_table, _half_error,
)  # fmt: skip

FP16 = Method(
    "fp16",
    "W -> float(half(W)), cast when the model is loaded",
    "half precision in the file only: half the bytes, the same time",
    False, False, Product, _half_offers, _half_layer, _half_error,
)  # fmt: skip

INT8_TABLES = Method(
    "int8-tables",
    "D[id] -> s * int8(D / s)[id], a scale per column",
    "linear quantisation, DequantizeLinear behind the lookup; a quarter of the bytes",
    False, False, Table, _int8_table_offers, _int8_table, _int8_table_error,
)  # fmt: skip

INT8 = Method(
    "int8",
    "x W -> s_x s_W (q(x) - z) q(W), inputs quantised as they come, weights with a scale per output",
    "dynamic quantisation, which onnxruntime fuses into DynamicQuantizeMatMul",
    False, False, Product, _int8_offers, _int8, _int8_error,
)  # fmt: skip

INT8_FUSED = Method(
    "int8-fused",
    "x W -> s_x s_W (q(x) - z) q(W), by DynamicQuantizeMatMul of com.microsoft",
    "as int8, for runtimes that do not fuse it: one operator of onnxruntime's own",
    False, True, Product, _int8_offers, _int8_fused, _int8_error,
)  # fmt: skip
