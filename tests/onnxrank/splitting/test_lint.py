"""The lint: a repository as it is written passes, and every kind of wrong configuration is told with file and line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from helpers import INT64, Graph
from split_models import history_model, ranker_model

from onnxrank.errors import UsageError
from onnxrank.splitting import Options, split
from onnxrank.splitting.lint import Finding, lint

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repository") / "out"
    split(ranker_model(), out, request=["user"], check=False, options=Options(format="triton", name="ctr"))
    return out


@pytest.fixture
def repository(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "out")
    return tmp_path / "out"


def test_what_is_written_passes(written: Path, tmp_path: Path) -> None:
    assert lint(written) == []
    for k, options in enumerate(({"guard": False}, {"state": "packed"}, {"dtype": "float16"})):
        split(ranker_model(), tmp_path / str(k), request=["user"], check=False, options=Options("triton", **options))
        assert lint(tmp_path / str(k)) == []
    split(history_model(), tmp_path / "history", request=["history"], check=False, options=Options("triton"))
    assert lint(tmp_path / "history") == []


def swap(file: str, old: str, new: str) -> Edit:
    """Replaces text of a configuration, once."""

    def edit(repository: Path) -> None:
        place = repository / file / "config.pbtxt"
        text = place.read_text()
        assert old in text, text
        place.write_text(text.replace(old, new, 1))

    return edit


def add(file: str, text: str) -> Edit:
    """Adds text to a configuration."""

    def edit(repository: Path) -> None:
        place = repository / file / "config.pbtxt"
        place.write_text(place.read_text() + text + "\n")

    return edit


def both(*edits: Edit) -> Edit:
    def edit(repository: Path) -> None:
        for e in edits:
            e(repository)

    return edit


def away(place: str) -> Edit:
    def edit(repository: Path) -> None:
        (target,) = repository.glob(place)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()

    return edit


R, C, E = "ctr_request", "ctr_candidate", "ctr"
STATE = "state_matmul_6_matmul"
WRONG: dict[str, tuple[Edit, str, int | None, str]] = {
    "no configuration": (away(f"{R}/config.pbtxt"), R, 1, "is missing: Triton would make one up"),
    "no version": (away(f"{R}/[1-9]*"), R, None, "no version of the model is there"),
    "no model": (away(f"{R}/[1-9]*/model.onnx"), R, 4, "does not exist"),
    "another file": (swap(R, "model.onnx", "ranker.onnx"), R, 4, "ranker.onnx does not exist"),
    "an open brace": (add(R, "parameters {"), R, 22, "is not closed"),
    "no colon": (swap(R, "max_batch_size: 0", "max_batch_size 0"), R, 6, "needs a colon"),
    "a missing comma": (swap(C, "},\n  { name: \"state", "}\n  { name: \"state"), C, 9, "needs a comma or ]"),
    "signs": (add(R, "%"), R, 22, "'%' is not understood"),
    "an unknown field": (add(R, "dynamic_batcher { }"), R, 22, "'dynamic_batcher'.*did you mean 'dynamic_batching'"),
    "another name": (swap(R, '"ctr_request"', '"ctr"'), R, 2, "the folder's is 'ctr_request'"),
    "a name twice": (add(R, 'name: "ctr_request"'), R, 22, "name is given twice"),
    "no backend": (swap(R, 'backend: "onnxruntime"', ""), R, 1, "neither backend"),
    "another backend": (swap(R, "onnxruntime", "pytorch"), R, 3, "'pytorch' does not run ONNX models"),
    "no batch size": (swap(R, "max_batch_size: 0", ""), R, 1, "max_batch_size is missing"),
    "a batch size that is none": (swap(R, "max_batch_size: 0", "max_batch_size: many"), R, 6, "is 'many'"),
    "a batch of users": (
        swap(R, "max_batch_size: 0", "max_batch_size: 8"), R, 6, "the model's 'user' takes 1: write 0",
    ),
    "dynamic batching": (add(C, "dynamic_batching { }"), C, 22, "dynamic_batching needs a max_batch_size"),
    "an input less": (swap(C, '{ name: "item" data_type: TYPE_FP32 dims: [ -1, 4 ] },', ""), C, 7, "'item' is missing"),
    "an input too many": (
        swap(C, "input [", 'input [ { name: "items" data_type: TYPE_FP32 dims: [ -1, 4 ] },'), C, 7,
        "no input 'items'; did you mean 'item'",
    ),
    "an input twice": (
        swap(C, "input [", 'input [ { name: "item" data_type: TYPE_FP32 dims: [ -1, 4 ] },'), C, 8, "listed twice",
    ),
    "an output too many": (
        swap(C, "output [", 'output [ { name: "scores" data_type: TYPE_FP32 dims: [ -1, 1 ] },'), C, 12,
        "no output 'scores'; did you mean 'score'",
    ),
    "no inputs at all": (swap(R, "input [\n  { name: \"user\" data_type: TYPE_FP32 dims: [ 1, 6 ] }\n]", ""), R, None,
                         "no input is listed"),
    "another type": (
        swap(C, "TYPE_FP32 dims: [ -1, 4 ]", "TYPE_FP16 dims: [ -1, 4 ]"), C, 8, "TYPE_FP16 here, and TYPE_FP32",
    ),
    "a type that is none": (
        swap(C, "TYPE_FP32 dims: [ -1, 4 ]", "TYPE_FLOAT dims: [ -1, 4 ]"), C, 8, "'TYPE_FLOAT' is no type",
    ),
    "an axis less": (swap(C, "[ -1, 4 ]", "[ 4 ]"), C, 8, "1 axes here, and 2 in the model"),
    "another extent": (swap(C, "[ -1, 4 ]", "[ -1, 5 ]"), C, 8, "axis 1 is 5 here, and 4 in the model"),
    "an extent that is fixed": (swap(R, "[ 1, 6 ]", "[ -1, 6 ]"), R, 8, "axis 0 is -1 here, and 1 in the model"),
    "an extent of 0": (swap(C, "[ -1, 4 ]", "[ 0, 4 ]"), C, 8, "dims are numbers from 1 on"),
    "no extents": (swap(C, "dims: [ -1, 4 ]", ""), C, 8, "has no dims"),
    "a field of an input": (
        swap(C, "dims: [ -1, 4 ]", "dims: [ -1, 4 ] ragged: true"), C, 8, "'ragged' is none of an input",
    ),
    "no instances": (swap(C, "count: 2", "count: 0"), C, 16, "0' instances cannot be"),
    "a kind that is none": (swap(C, "KIND_CPU", "KIND_TPU"), C, 16, "'KIND_TPU' is no kind"),
    "gpus of a cpu": (swap(C, "count: 2", "count: 2 gpus: [ 0 ]"), C, 16, "KIND_CPU have no gpus"),
    "all threads": (swap(C, 'string_value: "1"', 'string_value: "0"'), C, 19, "gives every instance all cores"),
    "no threads": (swap(C, "intra_op_thread_count", "threads"), C, 1, "intra_op_thread_count is not set"),
    "ragged of two axes": (
        both(swap(C, "max_batch_size: 0", "max_batch_size: 8"),
             swap(C, "dims: [ -1, 4 ]", "dims: [ -1, 4 ] allow_ragged_batch: true")), C, 8,
        "ragged inputs arrive flat, and the model's has 2 axes",
    ),
    "ragged without a batch": (
        swap(C, "dims: [ -1, 4 ]", "dims: [ -1, 4 ] allow_ragged_batch: true"), C, 8, "needs a max_batch_size",
    ),
    "an optional input": (
        both(swap(C, "max_batch_size: 0", "max_batch_size: 8"),
        swap(C, "dims: [ -1, 4 ]", "dims: [ 4 ] optional: true")),
        C, 8, "takes no optional inputs",
    ),
    "a kind of batch input": (
        add(C, 'batch_input [ { kind: BATCH_COUNT target_name: "item" data_type: TYPE_FP32 source_input: "item" } ]'),
        C, 22, "'BATCH_COUNT' is no kind of batch_input",
    ),
    "a type of batch input": (
        add(C,
        'batch_input [ { kind: BATCH_ITEM_SHAPE target_name: "item" data_type: TYPE_INT64 source_input: "item" } ]'),
        C, 22, "TYPE_INT32 or TYPE_FP32, not TYPE_INT64",
    ),
    "a target of batch input": (
        add(C,
        'batch_input [ { kind: BATCH_ITEM_SHAPE target_name: "lengths" data_type: TYPE_INT32 source_input: "item" } ]'),
        C, 22, "no input 'lengths'",
    ),
    "a source of batch input": (
        add(C, 'batch_input [ { kind: BATCH_ITEM_SHAPE target_name: "item" data_type: TYPE_FP32 source_input: "x" } ]'),
        C, 22, "no input 'x' is listed",
    ),
    "a target of batch output": (
        add(C, 'batch_output [ { target_name: "x" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "item" } ]'),
        C, 22, "no output 'x'",
    ),
    "a model that is not there": (
        swap(E, '"ctr_request"', '"ctr_requests"'), E, 15, "no model 'ctr_requests'; did you mean",
    ),
    "an ensemble's version": (away(f"{E}/1"), E, 1, "ctr/1 is missing"),
    "an ensemble that says not so": (swap(E, 'platform: "ensemble"', 'platform: "onnxruntime_onnx"'), E, None,
                                     'needs platform: "ensemble"'),
    "an input of a step": (swap(E, 'key: "user"', 'key: "users"'), E, None, "ctr_request has no input 'users'"),
    "an input of a step that is not mapped": (
        swap(E, '      input_map { key: "item" value: "item" }\n', ""),
        E, None, "'item' of ctr_candidate is not mapped",
    ),
    "an output of a step": (
        swap(E, 'output_map { key: "score"', 'output_map { key: "logit"'), E, None, "no output 'logit'",
    ),
    "a tensor that nothing gives": (
        swap(E, f'output_map {{ key: "{STATE}" value: "{STATE}" }}', f'output_map {{ key: "{STATE}" value: "o" }}'),
        E, None,
        f"nothing gives '{STATE}'",
    ),
    "a tensor given twice": (
        swap(E, 'output_map { key: "score" value: "score" }', 'output_map { key: "score" value: "user" }'), E, None,
        "'user' is given twice",
    ),
    "an output that nothing gives": (
        swap(E, '{ name: "score"', '{ name: "scores"'), E, None, "no step gives the ensemble's output 'scores'",
    ),
    "an input that nobody reads": (
        swap(E, "input [", 'input [ { name: "spare" data_type: TYPE_FP32 dims: [ 1 ] },'), E, 5, "no step reads",
    ),
    "a type of the ensemble": (
        swap(E, "TYPE_FP32 dims: [ 1, 6 ]", "TYPE_INT64 dims: [ 1, 6 ]"), E, None, "'user' is TYPE_INT64",
    ),
    "a shape of the ensemble": (swap(E, "[ 1, 6 ]", "[ 6 ]"), E, None, "'user' is TYPE_FP32 \\[6\\]"),
    "an output's type of the ensemble": (
        swap(E, 'name: "score" data_type: TYPE_FP32', 'name: "score" data_type: TYPE_FP64'),
        E, None, "the output 'score'",
    ),
    "an ensemble without steps": (swap(E, "step [", "steps ["), E, None, "the ensemble has no step"),
    "instances of an ensemble": (add(E, "instance_group [ { count: 2 } ]"), E, None, "no instances of its own"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_every_kind_of_wrong_configuration(repository: Path, kind: str) -> None:
    import re

    edit, model, line, says = WRONG[kind]
    edit(repository)
    found = lint(repository)
    mine = [f for f in found if f.file == f"{model}/config.pbtxt" and re.search(says, f.message)]
    assert mine, [str(f) for f in found]
    if line is not None:
        assert mine[0].line == line, str(mine[0])
    else:
        assert 1 <= mine[0].line <= (repository / model / "config.pbtxt").read_text().count("\n") + 1


def test_a_ragged_model(tmp_path: Path) -> None:
    """As the onnxruntime backend takes them: flat inputs, and lengths of the items' shape."""
    g = Graph(17)
    flat, lengths = g.input("item", ["M"]), g.input("lengths", ["R", 2], 6)
    rows = g.op("Reshape", flat, g.ints(-1, 4))
    g.op(
        "Add",
        g.op("ReduceSum", rows, g.ints(1), keepdims=0),
        g.op("Cast", g.op("ReduceMax", lengths, keepdims=0), to=1),
    )
    g.nodes[-1].output[0] = "score"
    g.output("score", ["K"])
    (tmp_path / "m" / "1").mkdir(parents=True)
    onnx.save(g.model(), tmp_path / "m" / "1" / "model.onnx")
    config = """name: "m" backend: "onnxruntime" max_batch_size: 32
input [ { name: "item" data_type: TYPE_FP32 dims: [ -1, 4 ] allow_ragged_batch: true } ]
batch_input [ { kind: BATCH_ITEM_SHAPE target_name: "lengths" data_type: TYPE_INT32 source_input: "item" } ]
output [ { name: "score" data_type: TYPE_FP32 dims: [ -1 ] } ]
batch_output [ { target_name: "score" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "item" } ]
dynamic_batching { max_queue_delay_microseconds: 500 }
parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
"""
    (tmp_path / "m" / "config.pbtxt").write_text(config)
    # Outputs that are cut by the batch come back with an axis more, which only the server sees.
    assert [f for f in lint(tmp_path) if "score" not in f.message] == []


def test_folders_that_are_no_repositories(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        lint(tmp_path / "none")
    with pytest.raises(UsageError, match="no model repository"):
        lint(tmp_path)


def test_names_of_any_kind(tmp_path: Path) -> None:
    g = Graph(17)
    user, item = g.input('us"er\\', ["N", 4], INT64), g.input("größe/1", ["N", 4], INT64)
    g.op("Add", g.op("Neg", user), item)
    g.nodes[-1].output[0] = "score:0"
    g.output("score:0", ["N", 4], INT64)
    split(g.model(), tmp_path / "out", request=['us"er*'], check=False, options=Options("triton"))
    assert lint(tmp_path / "out") == []


def test_a_finding_reads_as_compilers_say_it() -> None:
    assert str(Finding("m/config.pbtxt", 3, "is wrong")) == "m/config.pbtxt:3: is wrong"
