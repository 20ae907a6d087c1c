"""A real Triton on a CPU machine, of the package nvidia-pytriton, and a client of it.

python scripts/triton_server.py install            # into .triton, or where ONNXRANK_TRITON says
python scripts/triton_server.py run REPOSITORY     # serves a model repository until it is interrupted

The package holds tritonserver itself, its Python backend and its response cache, but not its ONNX Runtime backend: the
one in triton_backend stands in for that. It needs numpy below 2, so it has an environment of its own: what the extra
`triton` names.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path(os.environ.get("ONNXRANK_TRITON") or ROOT / ".triton")
"""The environment."""
_READY = 60.0  # seconds until the server has loaded its models
_TYPES = {
    "BOOL": np.bool_, "UINT8": np.uint8, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
    "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}


class Missing(Exception):
    """Triton cannot be had here; the message says why."""


# --- the environment -------------------------------------------------------------------------------------------------


def install(place: Path = PLACE) -> Path:
    """Makes the environment, if it is not there.

    Returns:
        Its interpreter.

    Raises:
        Missing: A package cannot be installed.
    """
    python = place / "bin" / "python"
    # Of several processes that start a server at the same time, one installs it.
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_name(f"{place.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "ready").exists():
            _fill(place, python)
    return python


def _fill(place: Path, python: Path) -> None:
    """Makes the environment anew.

    Raises:
        Missing: It cannot be had.
    """
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["triton"]
    try:
        venv.create(place, clear=True, with_pip=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True, timeout=900
        )
    except (OSError, subprocess.SubprocessError) as e:
        raise Missing(f"no environment for Triton: {e}") from e
    if done.returncode:
        last = next((line for line in done.stderr.splitlines()[::-1] if "ERROR" in line), "pip failed")
        raise Missing(f"nvidia-pytriton cannot be installed: {last}")
    (place / "ready").touch()


def _packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['platlib'])"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def _backends(packages: Path, into: Path) -> None:
    """The wheel's Python backend with the stub of this Python, and the stand-in."""
    own = packages / "pytriton" / "tritonserver"
    shutil.copytree(own / "backends" / "python", into / "python")
    stub = own / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}" / "triton_python_backend_stub"
    if not stub.exists():
        raise Missing(f"nvidia-pytriton has no stub for Python {sys.version_info[0]}.{sys.version_info[1]}")
    shutil.copy(stub, into / "python")
    (into / "onnxruntime").mkdir()
    shutil.copy(ROOT / "scripts" / "triton_backend" / "model.py", into / "onnxruntime")


# --- the server ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(repository: Path, cache: int = 16 << 20, place: Path = PLACE, explicit: bool = False) -> Iterator[Client]:
    """Serves a repository.

    Args:
        repository: The folder of models.
        cache: Bytes of the response cache.
        place: The environment.
        explicit: Whether `Client.load` may replace models while the server runs.

    Raises:
        Missing: Triton cannot be had here, or does not take the repository.
    """
    python = install(place)
    packages = _packages(python)
    with tempfile.TemporaryDirectory(prefix="triton-") as folder, socket.socket() as free:
        backends, log = Path(folder, "backends"), Path(folder, "log")
        backends.mkdir()
        _backends(packages, backends)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        own = packages / "pytriton" / "tritonserver"
        libraries = [str(packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
        environment = os.environ | {
            "LD_LIBRARY_PATH": ":".join(libraries),
            "PATH": f"{python.parent}:{os.environ.get('PATH', '')}",
            "VIRTUAL_ENV": str(place),
        }
        command = [
            str(own / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--cache-directory={own / 'caches'}",
            f"--cache-config=local,size={cache}",
            "--allow-grpc=0",
            "--allow-metrics=0",
            "--http-address=127.0.0.1",
            f"--http-port={port}",
            "--exit-on-error=true",
            *(["--model-control-mode=explicit", "--load-model=*"] if explicit else []),
        ]
        with open(log, "wb") as out:
            server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            _wait(server, port, log)
            with contextlib.closing(Client(port)) as client:
                yield client
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _READY
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with contextlib.closing(Client(port)) as client:
                if client.ready():
                    return
        except OSError:
            pass
        time.sleep(0.1)
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("E") or "error" in line]
    raise Missing(f"Triton did not get ready: {' '.join(lines[-3:]) or 'it did not say why'}")


# --- the client ------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """The server's own answer to a request that it does not serve."""


class Client:
    """A connection to a server, by HTTP with tensors in binary form. One thread at a time may use it.

    Args:
        port: The server's port on this machine.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def ready(self) -> bool:
        """Whether the server has loaded its models."""
        self._connection.request("GET", "/v2/health/ready")
        answer = self._connection.getresponse()
        answer.read()
        return answer.status == 200

    def infer(self, model: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a model.

        Raises:
            Refused: The server does not run it.
        """
        self.ask(model, inputs)
        return self.answer()

    def ask(self, model: str, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Has a model run; `answer` waits for what it gives."""
        bodies = [np.ascontiguousarray(v).tobytes() for v in inputs.values()]
        told = [
            {
                "name": name,
                "shape": list(v.shape),
                "datatype": _NAMES[v.dtype],
                "parameters": {"binary_data_size": len(body)},
            }
            for (name, v), body in zip(inputs.items(), bodies, strict=True)
        ]
        head = json.dumps({"inputs": told, "parameters": {"binary_data_output": True}}).encode()
        self._connection.request(
            "POST",
            f"/v2/models/{model}/infer",
            head + b"".join(bodies),
            {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"},
        )

    def answer(self) -> dict[str, NDArray[Any]]:
        """What a model gives that `ask` had run.

        Raises:
            Refused: The server does not run it.
        """
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise Refused(data.decode("utf-8", "replace"))
        size = int(answer.headers.get("Inference-Header-Content-Length", len(data)))
        at, out = size, {}
        for o in json.loads(data[:size])["outputs"]:
            count = o["parameters"]["binary_data_size"]
            out[o["name"]] = np.frombuffer(data[at : at + count], _TYPES[o["datatype"]]).reshape(o["shape"])
            at += count
        return out

    def load(self, model: str) -> None:
        """Loads a model again from its folder.

        Raises:
            Refused: The server does not.
        """
        self._connection.request("POST", f"/v2/repository/models/{model}/load", b"")
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise Refused(data.decode("utf-8", "replace"))

    def statistics(self, model: str) -> dict[str, int]:
        """How often a model ran, and how often its cache answered instead."""
        self._connection.request("GET", f"/v2/models/{model}/stats")
        found = json.loads(self._connection.getresponse().read())["model_stats"][0]
        counts = {key: int(value.get("count", 0)) for key, value in found["inference_stats"].items()}
        return {
            "executions": int(found.get("execution_count", 0)),
            "hits": counts.get("cache_hit", 0),
            "misses": counts.get("cache_miss", 0),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["install", "run"])
    parser.add_argument("repository", nargs="?", type=Path)
    given = parser.parse_args()
    try:
        if given.do == "install":
            print(install())
        elif given.repository is None:
            parser.error("run needs a repository")
        else:
            with serving(given.repository) as client, contextlib.suppress(KeyboardInterrupt):
                print(f"http://127.0.0.1:{client.port}")
                while True:
                    time.sleep(1)
    except Missing as e:
        print(e, file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
