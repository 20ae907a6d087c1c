"""Everything that onnxrank claims of a GPU, measured in one go: half an hour of a machine with one.

    python scripts/gpu_campaign.py --out campaign.json               # CUDA
    python scripts/gpu_campaign.py --out campaign.json --ep cpu      # the same steps without a GPU
    python scripts/gpu_campaign.py --out campaign.json --table       # what has been measured, as a table

Each step is written to the file when it is done, and not done again, so that a campaign that is cut off goes on where
it stopped. Models are made from a seed. Scores are compared with TF32 off; times are those of the runtime as it is
served. The steps: the machine; `verify` of the models in `models/onnx`, CPU against CUDA; times of industrial models
over N, in 32 and 16 bits, bound and in CUDA graphs, with the kernels' providers and copies; products whose inner extent
is padded to a multiple of 8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxrank
from onnxrank.roles import load_spec
from onnxrank.verify import Options, verify

ROOT = Path(__file__).resolve().parents[1]
COUNTS = (32, 128, 512, 2048, 8192)
INDUSTRIAL = ("dlrm", "dcnv2_stacked", "deepfm", "din", "mmoe", "field_attention", "history_transformer")
INNER = (100, 129, 250, 511)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass
class Campaign:
    """One campaign and its file.

    Attributes:
        path: The file.
        provider: `cuda` or `cpu`.
        until: When to stop, in seconds of `time.monotonic`.
        seconds: Seconds of timing per model and number of candidates.
        quick: Whether a few small models and numbers will do.
        folder: Where models are made.
        found: Results by step.
    """

    path: Path
    provider: str
    until: float
    seconds: float
    quick: bool
    folder: Path
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.found = json.loads(self.path.read_text())
            before = self.found.get("machine", {}).get("provider", self.provider)
            if before != self.provider:
                raise SystemExit(f"{self.path} is a campaign on {before}: take another file")

    def step(self, name: str, do: Callable[[], Any]) -> None:
        """Does a step, unless it is done or time is up, and writes down what it gave, or the error."""
        if name in self.found and "error" not in self.found[name]:
            return
        if time.monotonic() > self.until:
            print(f"{name}: no time left", flush=True)
            return
        begin = time.monotonic()
        try:
            made = do()
        except Exception as e:
            made = {"error": f"{type(e).__name__}: {e}"}
        self.found[name] = {**made, "seconds": round(time.monotonic() - begin, 1)}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1))
        part.replace(self.path)
        print(f"{name}: {made.get('error', 'done')}", flush=True)

    def run(self) -> None:
        """All steps, those first without which the others mean nothing."""
        self.step("machine", self.machine)
        if "error" in self.found["machine"]:
            raise SystemExit(self.found["machine"]["error"])
        small = sorted((ROOT / "models" / "onnx").glob("*.onnx"))
        for path in small[:2] if self.quick else small:
            self.step(f"verify {path.stem}", lambda path=path: self.verified(path))
        for name in ("deepfm",) if self.quick else INDUSTRIAL:
            for half in (False, True):
                for how in ("plain", "bound", "graph") if self.provider == "cuda" else ("plain",):
                    step = f"times {name} {'float16' if half else 'float32'} {how}"
                    self.step(step, lambda name=name, half=half, how=how: self.timed(name, half, how))
        self.step("padded", self.padded)

    # --- steps -------------------------------------------------------------------------------------------------------

    def machine(self) -> dict[str, Any]:
        """What is measured on; fails where the provider does not run anything."""
        graph = onnx.parser.parse_graph("g (float[1,4] x, float[4,4] w) => (float[1,4] y) { y = MatMul(x, w) }")
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[PROVIDERS[self.provider]])
        if session.get_providers()[0] != PROVIDERS[self.provider]:
            raise RuntimeError(f"{PROVIDERS[self.provider]} is not there: onnxruntime fell back to another provider")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        versions = {"onnxruntime": onnxruntime.__version__, "onnxrank": metadata.version("onnxrank")}
        return {"provider": self.provider, "gpu": device, **versions}

    def verified(self, path: Path) -> dict[str, Any]:
        """Original and result, scores of both providers."""
        spec = load_spec(path.with_name(f"{path.stem.split('.')[0]}.roles.yaml"))
        result = onnxrank.optimize(path, spec=spec, check=False)
        out = self.folder / path.name
        result.save(out)
        providers = tuple(dict.fromkeys(["cpu", self.provider]))
        found = verify(path, out, Options(spec=spec, providers=providers, tf32=False, level="quick"))
        return {"changed": result.changed, "passed": found.passed, "findings": [f.message for f in found.findings]}

    def industrial(self, name: str, half: bool) -> tuple[Path, Path]:
        """An industrial model from its seed, and what `optimize` makes of it."""
        from models import build, roles
        from scripts.export_models import export_torchscript

        path, out = (self.folder / f"{name}{'.half' * half}{kind}.onnx" for kind in ("", ".fast"))
        module, specs = build(name, "small" if self.quick else "industrial")
        if not out.exists():
            model = export_torchscript(module, specs)
            if half:
                from onnxruntime.transformers.float16 import convert_float_to_float16

                model = convert_float_to_float16(model, keep_io_types=True)
            onnx.save(model, path)
            made = onnxrank.optimize(path, spec=roles(specs), check=False, candidates=(COUNTS[0], COUNTS[-1]))
            made.save(out)
        return path, out

    def timed(self, name: str, half: bool, how: str) -> dict[str, Any]:
        """Times of original and result over N, and where their kernels run."""
        path, out = self.industrial(name, half)
        found = onnxrank.profile(
            path,
            out,
            candidates=COUNTS[:2] if self.quick else COUNTS,
            provider=self.provider,
            seconds=self.seconds,
            io_binding=how != "plain",
            cuda_graph=how == "graph",
            memory=False,
        ).to_dict()
        return {"points": found["points"], "models": found["models"]}

    def padded(self) -> dict[str, Any]:
        """Products of N x K with K x 256, K as it is and filled up with zeros to a multiple of 8."""
        out: dict[str, Any] = {}
        for dtype in (np.float32, np.float16):
            for k in INNER[:1] if self.quick else INNER:
                times = _in_turns([_product(width, dtype, PROVIDERS[self.provider]) for width in (k, -(-k // 8) * 8)])
                out[f"{np.dtype(dtype).name} {k}"] = {"as it is": times[0], "padded": times[1]}
        return out

    # --- reporting ---------------------------------------------------------------------------------------------------

    def table(self) -> Iterator[str]:
        """What has been measured, in lines of Markdown."""
        machine = self.found["machine"]
        yield f"On {machine['gpu']} ({machine['provider']}, onnxruntime {machine['onnxruntime']}):"
        checked = {k: v for k, v in self.found.items() if k.startswith("verify ")}
        wrong = [k for k, v in checked.items() if not v.get("passed")]
        yield f"verify: {len(checked) - len(wrong)} of {len(checked)} models pass"
        yield from (f"- not: {name.removeprefix('verify ')}" for name in wrong)
        yield ""
        yield "| model | precision | how | " + " | ".join(f"N = {n}" for n in COUNTS) + " |"
        yield "|---" * (3 + len(COUNTS)) + "|"
        for name, step in self.found.items():
            if name.startswith("times ") and "points" in step:
                ratio = {p["candidates"]: p["speedup"]["ratio"] for p in step["points"] if p["speedup"]}
                cells = [f"{ratio[n]:.2f}×" if n in ratio else "" for n in COUNTS]
                yield "| " + " | ".join([*name.split()[1:], *cells]) + " |"


Run = Callable[[], float]


def _product(k: int, dtype: Any, provider: str) -> Run:
    """A run of one product, on the device's own memory."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = numpy_helper.from_array(np.ones((k, 256), dtype), "w")
    ends = [helper.make_tensor_value_info(n, kind, ["N", d]) for n, d in (("x", k), ("y", 256))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider])
    device = "cuda" if provider == PROVIDERS["cuda"] else "cpu"
    binding = session.io_binding()
    data = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((2048, k), dtype), device)
    binding.bind_ortvalue_input("x", data)
    binding.bind_output("y", device)

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(20):
            session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return (time.perf_counter() - begin) / 20

    return run


def _in_turns(runs: list[Run], rounds: int = 30) -> list[float]:
    """Median seconds of each, run in turns."""
    for run in runs:
        run()
    taken = [[run() for run in runs] for _ in range(rounds)]
    return [statistics.median(t) for t in zip(*taken, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 1 if a step failed or a model does not verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("campaign.json"), help="file of the results")
    parser.add_argument("--ep", choices=list(PROVIDERS), default="cuda")
    parser.add_argument("--minutes", type=float, default=35.0, help="when to stop; run it again to go on")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per model and number of candidates")
    parser.add_argument("--quick", action="store_true", help="a few small models, to see that all of it works")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        until = time.monotonic() + 60 * options.minutes
        campaign = Campaign(options.out, options.ep, until, options.seconds, options.quick, Path(folder))
        if not options.table:
            campaign.run()
        print("\n".join(campaign.table()))
    steps = campaign.found.values()
    return int(any("error" in s or not s.get("passed", True) for s in steps))


if __name__ == "__main__":
    raise SystemExit(main())
