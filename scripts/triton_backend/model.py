"""Stands in for Triton's ONNX Runtime backend on machines without it: a Python-based backend of the same name.

Triton itself reads the configurations, schedules, caches and runs ensembles; this holds a session, for models of
max_batch_size 0.
"""

import json
import os

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        if config["max_batch_size"]:
            raise pb_utils.TritonModelException("this stand-in runs models of max_batch_size 0 only")
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

    def execute(self, requests):
        return [self.answer(r) for r in requests]

    def answer(self, request):
        try:
            feed = {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in self.inputs}
            found = self.session.run(self.outputs, feed)
        except Exception as e:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(e)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(n, v) for n, v in zip(self.outputs, found, strict=True)])
