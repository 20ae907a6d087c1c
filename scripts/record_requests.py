"""Writes made-up recorded requests of a model as Parquet, to try `onnxrank verify --data` on many of them.

python scripts/record_requests.py models/onnx/mmoe.torchscript.onnx r.parquet --request 'user_*' --requests 100000
"""

from __future__ import annotations

import argparse

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq

from onnxrank import feeds
from onnxrank.facts import settings
from onnxrank.model import load
from onnxrank.roles import load_spec, resolve
from onnxrank.study import Study


def column(data: np.ndarray) -> pa.Array:
    """Rows as a column: lists where they have several entries."""
    flat = pa.array(data.reshape(-1))
    for width in data.shape[:0:-1]:
        flat = pa.FixedSizeListArray.from_arrays(flat, width)
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--request", action="append", default=[])
    parser.add_argument("--roles")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--candidates", type=int, default=20, help="most per request")
    parser.add_argument("--row-group", type=int, default=20_000)
    args = parser.parse_args()
    loaded = load(args.model)
    spec = load_spec(args.roles) if args.roles else None
    roles = resolve(feeds.describe(loaded.proto), request=args.request, spec=spec)
    study = Study(onnx.load(args.model), roles, loaded)
    rng = np.random.default_rng(0)
    writer = None
    held: list[pa.Table] = []
    rows = 0
    for number in range(args.requests):
        count = int(rng.integers(1, args.candidates + 1))
        (point,) = settings(study.symbols, (count,))
        feed = study.maker(type(point)(point.symbols, number))
        arrays = {i.name: column(feed[i.name]) for i in study.declared}
        arrays["request_id"] = pa.array(np.full(count, number))
        arrays["label"] = pa.array((rng.random(count) < 0.2).astype(np.int8))
        held.append(pa.table(arrays))
        rows += count
        if rows >= args.row_group or number == args.requests - 1:
            table = pa.concat_tables(held).combine_chunks()
            writer = writer or pq.ParquetWriter(args.out, table.schema)
            writer.write_table(table)
            held, rows = [], 0
    if writer is not None:
        writer.close()


if __name__ == "__main__":
    main()
