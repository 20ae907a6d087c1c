"""Stands in for Triton's ONNX Runtime backend on machines without it: a Python-based backend of the same name.

Triton itself reads the configurations, schedules, joins requests, caches and runs ensembles; this holds a session, and
joins and cuts tensors as that backend does: rows of what has one per request, ragged inputs flat, one behind the other,
the shapes of items, and outputs cut by them.
"""

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = config.get("default_model_filename") or "model.onnx"
        home = args["model_repository"].rstrip("/")
        tries = [os.path.join(home, args["model_version"], file)]
        tries.append(os.path.join(os.path.dirname(home), config["name"], args["model_version"], file))
        told = config.get("parameters", {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(told.get("intra_op_thread_count", {}).get("string_value", 0))
        options.inter_op_num_threads = 1
        path = next(p for p in tries if os.path.exists(p))
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [i["name"] for i in config["input"]]
        self.outputs = [o["name"] for o in config["output"]]
        self.batched = config["max_batch_size"] > 0
        self.ragged = {i["name"] for i in config["input"] if i.get("allow_ragged_batch")}
        self.dims = {o["name"]: [int(d) for d in o["dims"]] for o in config["output"]}
        self.shapes = [(n, b["source_input"][0]) for b in config.get("batch_input", []) for n in b["target_name"]]
        self.cuts = {n: b["source_input"][0] for b in config.get("batch_output", []) for n in b["target_name"]}
        kinds = {b["kind"] for b in config.get("batch_input", [])}
        if kinds - {"BATCH_ITEM_SHAPE"}:
            raise pb_utils.TritonModelException(f"this stand-in does not know {', '.join(sorted(kinds))}")

    def execute(self, requests):
        groups = [requests] if self.batched else [[r] for r in requests]
        return [answer for group in groups for answer in self.answers(group)]

    def answers(self, group):
        try:
            given = {n: [pb_utils.get_input_tensor_by_name(r, n).as_numpy() for r in group] for n in self.inputs}
            feed = {
                n: np.concatenate([v.reshape(-1) for v in values] if n in self.ragged else values)
                for n, values in given.items()
            }
            for name, source in self.shapes:
                feed[name] = np.array([v.shape[1:] for v in given[source]], np.int32)
            found = dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
            return [pb_utils.InferenceResponse(tensors) for tensors in self.parted(given, found)]
        except Exception as e:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(e))) for _ in group]

    def parted(self, given, found):
        """Per request its part of each output."""
        if not self.batched:
            yield [pb_utils.Tensor(n, v) for n, v in found.items()]
            return
        rows = next(iter(given.values()))
        for k in range(len(rows)):
            tensors = []
            for name, value in found.items():
                if name in self.cuts:
                    # An extent that is open is that of the source's axis.
                    every = [
                        [d if d >= 0 else v.shape[1 + axis] for axis, d in enumerate(self.dims[name])]
                        for v in given[self.cuts[name]]
                    ]
                    ends = np.cumsum([int(np.prod(s)) for s in every])
                    own = value.reshape(-1)[ends[k] - int(np.prod(every[k])) : ends[k]].reshape([1, *every[k]])
                else:
                    own = value[k : k + 1]
                tensors.append(pb_utils.Tensor(name, np.ascontiguousarray(own)))
            yield tensors
