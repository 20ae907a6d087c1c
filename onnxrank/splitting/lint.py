"""Holds a model repository for Triton against its ONNX files: what Triton would refuse, or take and serve wrongly.

Triton reads a configuration before it loads a model, and its errors name neither line nor cause; some mistakes it does
not see at all, such as threads of every core for every instance.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto

from onnxrank import model as files
from onnxrank.errors import OnnxrankError, UsageError
from onnxrank.feeds import graph_inputs
from onnxrank.splitting import contract
from onnxrank.splitting.pbtxt import Malformed, Message, parse
from onnxrank.splitting.triton import CONFIG, TYPES

_FIELDS = set(
    """name platform backend runtime version_policy max_batch_size input output batch_input batch_output optimization
    dynamic_batching sequence_batching ensemble_scheduling instance_group default_model_filename
    cc_model_filenames metric_tags parameters model_warmup model_operations model_transaction_policy
    model_repository_agents response_cache model_metrics""".split()
)
_TENSOR = {"name", "data_type", "format", "dims", "reshape", "is_shape_tensor", "allow_ragged_batch", "optional",
           "label_filename", "is_non_linear_format_io"}  # fmt: skip
_KINDS = {"KIND_AUTO", "KIND_CPU", "KIND_GPU", "KIND_MODEL"}
_BATCH_INPUTS = {"BATCH_ELEMENT_COUNT", "BATCH_ACCUMULATED_ELEMENT_COUNT", "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
                 "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", "BATCH_ITEM_SHAPE", "BATCH_ITEM_SHAPE_FLATTEN"}  # fmt: skip
_BATCH_OUTPUTS = {"BATCH_SCATTER_WITH_INPUT_SHAPE"}
_BATCH_TYPES = {"TYPE_INT32", "TYPE_FP32"}
_ALL_TYPES = {*TYPES.values()}


@dataclass(frozen=True, order=True)
class Finding:
    """Something wrong.

    Attributes:
        file: Where, relative to the repository.
        line: Its line, from 1.
        message: What is wrong, and what is right.
    """

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class _Value:
    """A tensor as it is declared somewhere; shapes are None, or have None for what is not fixed.

    Attributes:
        type: Its type.
        shape: What the model takes or gives.
        cut: What callers give or get of it, where the server joins requests and cuts outputs; else None.
    """

    type: str
    shape: tuple[int | None, ...] | None
    cut: tuple[int | None, ...] | None = None

    @property
    def seen(self) -> tuple[int | None, ...] | None:
        """What callers give or get."""
        return self.shape if self.cut is None else self.cut


@dataclass
class _Model:
    """A model of the repository."""

    name: str
    config: Message
    inputs: dict[str, _Value] = field(default_factory=dict)
    outputs: dict[str, _Value] = field(default_factory=dict)
    batched: bool = False

    @property
    def file(self) -> str:
        return f"{self.name}/{CONFIG}"


def lint(repository: str | os.PathLike[str]) -> list[Finding]:
    """What is wrong with a repository.

    Args:
        repository: Its folder.

    Returns:
        Findings, by file and line; none if all is well.

    Raises:
        UsageError: It is no folder of models.
    """
    home = Path(repository)
    if not home.is_dir():
        raise UsageError(f"{repository} is no folder.")
    folders = sorted(p for p in home.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not any((p / CONFIG).exists() for p in folders):
        raise UsageError(f"{repository} holds no model with a {CONFIG}, so it is no model repository of Triton.")
    found: list[Finding] = []
    models: dict[str, _Model] = {}
    for place in folders:
        read = _read(place, found)
        if read is not None:
            models[place.name] = read
    for model in models.values():
        found += (Finding(model.file, line, text) for line, text in _model(home, model))
    for model in models.values():
        if _is_ensemble(model.config):
            found += (Finding(model.file, line, text) for line, text in _ensemble(model, models))
    return sorted(set(found))


def _read(place: Path, found: list[Finding]) -> _Model | None:
    file = f"{place.name}/{CONFIG}"
    try:
        text = (place / CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError:
        found.append(Finding(file, 1, "is missing: Triton would make one up, and may batch requests of several users"))
        return None
    except (OSError, UnicodeDecodeError) as e:
        found.append(Finding(file, 1, f"cannot be read: {e}"))
        return None
    try:
        return _Model(place.name, parse(text))
    except Malformed as e:
        found.append(Finding(file, e.line, str(e)))
        return None


def _is_ensemble(config: Message) -> bool:
    return config.text("platform") == "ensemble" or config.has("ensemble_scheduling")


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


# --- one model ------------------------------------------------------------------------------------------------------

_Findings = Iterator[tuple[int, str]]


def _model(home: Path, model: _Model) -> _Findings:
    config = model.config
    for f in config.fields:
        if f.name not in _FIELDS:
            yield f.line, f"the field {f.name!r} is none of a model's configuration{_near(f.name, _FIELDS)}"
    for name in ("name", "platform", "backend", "max_batch_size"):
        if len(config.all(name)) > 1:
            yield config.all(name)[1].line, f"{name} is given twice"
    if config.has("name") and config.text("name") != model.name:
        yield config.where("name"), f"the name is {config.text('name')!r}, and the folder's is {model.name!r}"
    yield from _size(model)
    yield from _declared(model)
    yield from _instances(model)
    if _is_ensemble(config):
        if config.text("platform") != "ensemble":
            yield config.where("ensemble_scheduling"), 'an ensemble needs platform: "ensemble"'
        if not any(p.is_dir() and p.name.isdigit() for p in (home / model.name).iterdir()):
            yield 1, f"the folder {model.name}/1 is missing: Triton wants a version of an ensemble, too"
        return
    proto = None
    backend, platform = config.text("backend"), config.text("platform")
    if not backend and not platform:
        yield 1, 'neither backend: "onnxruntime" nor a platform is given'
    elif (backend or "onnxruntime") != "onnxruntime" or (platform or "onnxruntime_onnx") != "onnxruntime_onnx":
        other = config.where("backend" if backend else "platform")
        if any((home / model.name).glob("*/*.onnx")):
            yield other, f"{backend or platform!r} does not run ONNX models: onnxruntime does"
        return
    try:
        proto = _onnx(home, model)
    except OnnxrankError as e:
        yield config.where("default_model_filename"), str(e)
    if proto is not None:
        yield from _against(model, proto)
    yield from _threads(config)


def _onnx(home: Path, model: _Model) -> ModelProto:
    """The newest version's model.

    Raises:
        OnnxrankError: There is none that can be read.
    """
    versions = sorted((int(p.name), p) for p in (home / model.name).iterdir() if p.is_dir() and p.name.isdigit())
    if not versions:
        raise UsageError(f"no version of the model is there: its file belongs into {model.name}/1")
    return files.load(versions[-1][1] / model.config.text("default_model_filename", "model.onnx")).proto


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


def _size(model: _Model) -> _Findings:
    config = model.config
    size = _number(config.text("max_batch_size", "0"))
    if not config.has("max_batch_size"):
        yield 1, "max_batch_size is missing: write 0, since the number of candidates is no batch"
    elif size is None or size < 0:
        yield config.where("max_batch_size"), f"max_batch_size is {config.text('max_batch_size')!r}, which is no number"
    model.batched = bool(size and size > 0)
    if config.has("dynamic_batching") and not model.batched:
        yield config.where("dynamic_batching"), "dynamic_batching needs a max_batch_size above 0"
    if config.has("dynamic_batching") and config.has("sequence_batching"):
        yield config.where("sequence_batching"), "only one of dynamic_batching and sequence_batching can be"


def _declared(model: _Model) -> _Findings:
    """Reads what inputs and outputs are declared."""
    scattered = {t.text for m in model.config.messages("batch_output") for t in m.scalars("target_name")}
    for what, into in (("input", model.inputs), ("output", model.outputs)):
        for m in model.config.messages(what):
            yield from _tensor(what, m, into, model.batched, scattered if what == "output" else set())
        if not into:
            yield model.config.where(what), f"no {what} is listed: Triton would make the list up"


def _tensor(what: str, m: Message, into: dict[str, _Value], batched: bool, scattered: Collection[str]) -> _Findings:
    name = m.text("name")
    for f in m.fields:
        if f.name not in _TENSOR:
            yield f.line, f"the field {f.name!r} is none of an {what}{_near(f.name, _TENSOR)}"
    if not name:
        yield m.line, f"an {what} has no name"
        return
    if name in into:
        yield m.where("name"), f"the {what} {name!r} is listed twice"
    kind = m.text("data_type")
    if kind not in _ALL_TYPES:
        yield m.where("data_type"), f"{what} {name!r}: {kind or 'no data_type'!r} is no type{_near(kind, _ALL_TYPES)}"
    sizes = [_number(d.text) for d in m.scalars("dims")]
    if not sizes:
        yield m.where("dims"), f"{what} {name!r} has no dims"
    elif any(d is None or d < -1 or d == 0 for d in sizes):
        yield m.where("dims"), f"{what} {name!r}: dims are numbers from 1 on, or -1 for what varies"
    if m.text("optional") == "true" and batched:
        yield (
            m.where("optional"),
            f"{what} {name!r}: the onnxruntime backend takes no optional inputs with max_batch_size",
        )
    shapes = m.messages("reshape")
    if shapes:
        sizes = [_number(d.text) for d in shapes[0].scalars("shape")]
    shape = tuple(None if d is None or d < 1 else d for d in sizes)
    if m.text("allow_ragged_batch") == "true":
        if not batched:
            yield m.where("allow_ragged_batch"), f"{what} {name!r}: allow_ragged_batch needs a max_batch_size above 0"
        into[name] = _Value(kind, (None,), (None, *shape))  # all requests' entries one after another
        return
    if name in scattered:
        into[name] = _Value(kind, (None,), (None, *shape))
        return
    into[name] = _Value(kind, (None, *shape) if batched else shape)


def _instances(model: _Model) -> _Findings:
    for m in model.config.messages("instance_group"):
        kind, many = m.text("kind", "KIND_AUTO"), _number(m.text("count", "1"))
        if kind not in _KINDS:
            yield m.where("kind"), f"{kind!r} is no kind of instances{_near(kind, _KINDS)}"
        if many is None or many < 1:
            yield m.where("count"), f"an instance_group of {m.text('count')!r} instances cannot be"
        if kind == "KIND_CPU" and m.has("gpus"):
            yield m.where("gpus"), "instances of KIND_CPU have no gpus"
        if _is_ensemble(model.config):
            yield m.line, "an ensemble has no instances of its own: write them at its models"


def _threads(config: Message) -> _Findings:
    """Threads of one instance: 0, and nothing at all, means every core."""
    for m in config.messages("parameters"):
        if m.text("key") == "intra_op_thread_count":
            told = next((v for v in m.messages("value")), m)
            many = _number(told.text("string_value"))
            if many is None or many < 0:
                yield m.where("value"), f"intra_op_thread_count is {told.text('string_value')!r}, which is no number"
            elif many == 0:
                yield m.where("value"), "intra_op_thread_count 0 gives every instance all cores: write 1"
            return
    yield 1, "intra_op_thread_count is not set, which gives every instance all cores: write 1 under parameters"


def _against(model: _Model, proto: ModelProto) -> _Findings:
    """Holds a configuration against its ONNX model."""
    config = model.config
    takes = {i.name: _of(i) for i in graph_inputs(proto)}
    gives = {o.name: _of(o) for o in proto.graph.output}
    overridable = {t.name for t in proto.graph.initializer}
    batch = list(_batch_inputs(model, takes))
    for line, text, _ in batch:
        if text:
            yield line, text
    extra = {name for _, _, name in batch if name}
    ragged = {m.text("name") for m in config.messages("input") if m.text("allow_ragged_batch") == "true"}
    for what, listed, held in (("input", model.inputs, takes), ("output", model.outputs, gives)):
        lines = {m.text("name"): m for m in config.messages(what)}
        for name, value in listed.items():
            m = lines[name]
            if name not in held:
                if name not in overridable or what == "output":
                    yield m.where("name"), f"the model has no {what} {name!r}{_near(name, held)}"
                continue
            yield from _fits(what, name, m, value, held[name], name in ragged)
    for name in takes:
        if name not in model.inputs and name not in extra:
            yield config.where("input"), f"the model's input {name!r} is missing: {_shown(takes[name])}"
    if model.batched:
        for name, value in takes.items():
            if value.shape and value.shape[0] is not None and name not in extra:
                yield (
                    config.where("max_batch_size"),
                    f"with max_batch_size every input has a row per request, and the model's {name!r} takes "
                    f"{value.shape[0]}: write 0",
                )
    yield from _batch_outputs(model, gives)


def _fits(what: str, name: str, m: Message, told: _Value, held: _Value, ragged: bool) -> _Findings:
    if told.type in _ALL_TYPES and told.type != held.type:
        yield m.where("data_type"), f"{what} {name!r} is {told.type} here, and {held.type} in the model"
    if ragged and held.shape is not None and len(held.shape) != 1:
        yield (
            m.where("allow_ragged_batch"),
            f"{what} {name!r}: ragged inputs arrive flat, and the model's has {len(held.shape)} axes instead of 1",
        )
        return
    if told.shape is None or held.shape is None:
        return
    if len(told.shape) != len(held.shape):
        yield (
            m.where("dims"),
            f"{what} {name!r} has {len(told.shape)} axes here, and {len(held.shape)} in the model: {_shown(held)}",
        )
        return
    for k, (a, b) in enumerate(zip(told.shape, held.shape, strict=True)):
        if b is not None and a != b:
            shown = "-1" if a is None else a
            yield m.where("dims"), f"{what} {name!r}: axis {k} is {shown} here, and {b} in the model"


def _of(value: object) -> _Value:
    told = contract.described(value)  # type: ignore[arg-type]
    known = value.type.tensor_type.HasField("shape")  # type: ignore[attr-defined]
    shape = tuple(d if isinstance(d, int) and d >= 0 else None for d in told["shape"]) if known else None
    return _Value(TYPES.get(told["type"], told["type"]), shape)


def _shown(value: _Value) -> str:
    shape = "?" if value.seen is None else ", ".join("-1" if d is None else str(d) for d in value.seen)
    return f"{value.type} [{shape}]"


def _batch_inputs(model: _Model, takes: Mapping[str, _Value]) -> Iterator[tuple[int, str, str]]:
    """Findings on `batch_input`, and the inputs that these give."""
    for m in model.config.messages("batch_input"):
        kind, type_ = m.text("kind", "BATCH_ELEMENT_COUNT"), m.text("data_type")
        if kind not in _BATCH_INPUTS:
            yield m.where("kind"), f"{kind!r} is no kind of batch_input{_near(kind, _BATCH_INPUTS)}", ""
        if type_ not in _BATCH_TYPES:
            yield m.where("data_type"), f"a batch_input is TYPE_INT32 or TYPE_FP32, not {type_ or 'nothing'}", ""
        if not model.batched:
            yield m.line, "batch_input needs a max_batch_size above 0", ""
        for s in m.scalars("target_name"):
            yield s.line, "", s.text
            if s.text not in takes:
                yield s.line, f"the model has no input {s.text!r}{_near(s.text, takes)}", ""
            elif type_ in _BATCH_TYPES and takes[s.text].type != type_:
                yield s.line, f"the batch_input {s.text!r} is {type_} here, and {takes[s.text].type} in the model", ""
        for s in m.scalars("source_input"):
            if s.text not in model.inputs:
                yield (
                    s.line,
                    f"no input {s.text!r} is listed that batch_input could count{_near(s.text, model.inputs)}",
                    "",
                )


def _batch_outputs(model: _Model, gives: Mapping[str, _Value]) -> _Findings:
    for m in model.config.messages("batch_output"):
        kind = m.text("kind", "BATCH_SCATTER_WITH_INPUT_SHAPE")
        if kind not in _BATCH_OUTPUTS:
            yield m.where("kind"), f"{kind!r} is no kind of batch_output{_near(kind, _BATCH_OUTPUTS)}"
        for s in m.scalars("target_name"):
            if s.text not in gives:
                yield s.line, f"the model has no output {s.text!r}{_near(s.text, gives)}"
        for s in m.scalars("source_input"):
            if s.text not in model.inputs:
                yield s.line, f"no input {s.text!r} is listed whose lengths batch_output could take"


# --- ensembles ------------------------------------------------------------------------------------------------------


def _maps(step: Message, what: str) -> list[tuple[str, str, int]]:
    return [(m.text("key"), m.text("value"), m.line) for m in step.messages(what)]


def _ensemble(model: _Model, models: Mapping[str, _Model]) -> _Findings:
    config = model.config
    steps = [s for e in config.messages("ensemble_scheduling") for s in e.messages("step")]
    if not steps:
        yield config.where("ensemble_scheduling"), "the ensemble has no step"
    # Tensors of the ensemble: what they are, and who gives them.
    known: dict[str, tuple[_Value, str]] = {n: (v, "the ensemble's inputs") for n, v in model.inputs.items()}
    read: set[str] = set()
    for step in steps:
        part = models.get(step.text("model_name"))
        if part is None:
            name = step.text("model_name")
            yield step.where("model_name"), f"the repository has no model {name!r}{_near(name, models)}"
            continue
        for key, value, line in _maps(step, "output_map"):
            if key not in part.outputs:
                yield line, f"{part.name} has no output {key!r}{_near(key, part.outputs)}"
            elif value in known:
                yield line, f"{value!r} is given twice: by {part.name}, and by {known[value][1]}"
            else:
                known[value] = part.outputs[key], part.name
    for step in steps:
        part = models.get(step.text("model_name"))
        if part is None:
            continue
        yield from _step_inputs(step, part, known)
        read |= {value for _, value, _ in _maps(step, "input_map")}
    for name, told in model.outputs.items():
        line = next(m.where("name") for m in config.messages("output") if m.text("name") == name)
        if name not in known or name in model.inputs:
            yield line, f"no step gives the ensemble's output {name!r}{_near(name, known)}"
        elif _differ(told, known[name][0]):
            yield (
                line,
                f"the output {name!r} is {_shown(told)} here, and {_shown(known[name][0])} in {known[name][1]}",
            )
    for name in model.inputs:
        if name not in read:
            line = next(m.where("name") for m in config.messages("input") if m.text("name") == name)
            yield line, f"no step reads the ensemble's input {name!r}"


def _step_inputs(step: Message, part: _Model, known: Mapping[str, tuple[_Value, str]]) -> _Findings:
    mapped: set[str] = set()
    for key, value, line in _maps(step, "input_map"):
        if key in mapped:
            yield line, f"the input {key!r} of {part.name} is mapped twice"
        mapped.add(key)
        if key not in part.inputs:
            yield line, f"{part.name} has no input {key!r}{_near(key, part.inputs)}"
        elif value not in known:
            yield line, f"nothing gives {value!r}, which {part.name} reads{_near(value, known)}"
        elif _differ(part.inputs[key], known[value][0]):
            given, giver = known[value]
            yield line, f"{value!r} is {_shown(given)} in {giver}, and {_shown(part.inputs[key])} in {part.name}"
    for name in part.inputs:
        if name not in mapped:
            yield step.line, f"the input {name!r} of {part.name} is not mapped"


def _differ(a: _Value, b: _Value) -> bool:
    """Whether two declarations of a tensor cannot both hold."""
    return a.type != b.type or not (a.seen is None or b.seen is None or _same_axes(a.seen, b.seen))


def _same_axes(a: Sequence[int | None], b: Sequence[int | None]) -> bool:
    return len(a) == len(b) and all(x is None or y is None or x == y for x, y in zip(a, b, strict=True))
