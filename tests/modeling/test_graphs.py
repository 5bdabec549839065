"""Compiled decode functions: the same values as uncompiled ones, kept on disk, made again when damaged or outdated."""

import functools
import itertools

import pytest
import torch

from cognica_poe.modeling import graphs_cognica_poe as graphs
from cognica_poe.modeling.engine_cognica_poe import Heads
from cognica_poe.modeling.linears_cognica_poe import DenseLinear
from tests.conftest import make_model

FIXED = (4, (0.5, 0.5), 0.0)
KEY = ("pool", 0)


def heads_and_tensors():
    model = make_model(dtype=torch.float32)
    states = [torch.randn(2, 64, model.config.hidden_size) for _ in range(2)]
    heads = [DenseLinear(model.head_weight(stage)) for stage in (0, 2)]
    return Heads(model.config, heads), (torch.tensor([[5, 9], [4, 2]]), *states)


@pytest.mark.skipif(not graphs.has_compiler(), reason="no C++ compiler")
@torch.no_grad()
def test_packages_are_kept_checked_and_made_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(graphs, "cache_folder", lambda: tmp_path / "cache")
    heads, tensors = heads_and_tensors()
    expected = heads(*FIXED, *tensors)

    def run():
        made = graphs.Graphs(torch.device("cpu"))
        for _ in range(2):
            torch.testing.assert_close(made.call(KEY, heads, FIXED, *tensors), expected)
        assert made.seconds > 0
        return made.compiled, made.loaded

    assert run() == (1, 0)
    assert "AUTOTUNE" not in "".join(capfd.readouterr()).upper()
    assert run() == (0, 1)
    (package,) = (tmp_path / "cache").iterdir()  # nothing half-written beside it
    package.write_bytes(package.read_bytes()[:1000])
    assert run() == (1, 0)
    assert run() == (0, 1)


def test_the_name_of_a_package_tells_what_it_depends_on(monkeypatch):
    heads, tensors = heads_and_tensors()

    def name(fixed=FIXED, tensors=tensors):
        return graphs._digest(graphs._Fixed(heads, fixed), tensors)

    first = name()
    assert name() == first == name(tensors=tuple(t.clone() for t in tensors))
    others = {name(fixed=(8, *FIXED[1:])), name(tensors=tuple(t[:1] for t in tensors))}
    with torch.no_grad():
        heads.heads[1].weight[0, 0] += 1
    others.add(name())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    others.add(name())
    torch.set_num_threads(threads)
    assert len(others | {first}) == 5


def test_a_failing_compiler_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "cache_folder", lambda: tmp_path / "cache")

    def fail(*args, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    heads, tensors = heads_and_tensors()
    with torch.no_grad(), pytest.raises(RuntimeError, match="no compiler"):
        graphs.Graphs(torch.device("cpu")).call(KEY, heads, FIXED, *tensors)
    assert not list((tmp_path / "cache").iterdir())


def test_no_compiler(monkeypatch):
    monkeypatch.setattr("cognica_poe.modeling.decoding_cognica_poe.has_compiler", lambda: False)
    model = make_model()
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        model.prepare_decoding(compile=True)
    model.prepare_decoding(compile=False)


def overwriting(program, _):
    """A backend for dynamo that does no more than CUDA graphs do: each call writes its answer over the last one."""
    kept = []

    def run(*arguments):
        found = program(*arguments)
        if not kept:
            kept.extend(torch.empty_like(out) for out in found)
        for old, new in zip(kept, found, strict=True):
            old.copy_(new)
        return tuple(kept)

    return run


@pytest.fixture
def launched(monkeypatch):
    """The accelerator's way of compiling, on a processor and without a compiler behind dynamo."""
    monkeypatch.setattr(graphs, "ON_ACCELERATOR", {})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=overwriting))
    monkeypatch.setattr(graphs.Graphs, "_package", graphs.Graphs._launched)


@torch.no_grad()
def test_every_launched_function_and_shape_has_a_graph_of_its_own(launched):
    """More keys than dynamo keeps graphs of one code object, all alike in structure and each with its own answer."""
    heads, (table, *states) = heads_and_tensors()
    made = graphs.Graphs(torch.device("cpu"))
    calls = []
    for width, rows in itertools.product((1, 2, 4), (1, 2)):
        tensors = (table[:, :rows], *(x[:rows] for x in states))
        for weights in ((0.5, 0.5), (0.2, 0.8), (0.8, 0.2)):
            calls.append(((width, weights, 0.0), tensors))
    assert len(calls) > 2 * torch._dynamo.config.recompile_limit
    for _ in range(2):
        for fixed, tensors in calls:
            found = made.call((fixed, tensors[0].shape), heads, fixed, *tensors)
            assert torch.equal(found, heads(*fixed, *tensors)), fixed


@pytest.mark.parametrize("layers", [[2, 2, 2], [4, 1, 1]])
def test_launched_graphs_decode_as_the_functions_themselves(launched, layers):
    model = make_model(dtype=torch.float32, num_hidden_layers=6, poe_stage_layers=layers)
    single = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(0))

    def texts():
        for ids in (single, single.repeat(3, 1).roll(2)):
            yield model.generate_prefix(ids, max_new_tokens=12)
            yield from (model.generate_stage(ids, stage, max_new_tokens=12) for stage in range(3))
            yield model.generate_wand(ids, p99_bounds=[0.2, 0.1], max_new_tokens=12)
            yield model.generate_speculative(ids, 0, 3, max_new_tokens=12)

    model.prepare_decoding(width=4)
    expected = list(texts())
    model.prepare_decoding(compile=True, width=4)
    for found, text in zip(texts(), expected, strict=True):
        assert torch.equal(found, text)
    assert model.decoding_seconds_compiled() > 0


@torch.no_grad()
def test_an_answer_outlives_the_next_launch_of_its_graph(launched):
    heads, (table, *states) = heads_and_tensors()
    made = graphs.Graphs(torch.device("cpu"))
    first = made.call(KEY, heads, FIXED, table, *states)
    expected = first.clone()
    second = made.call(KEY, heads, FIXED, table, *(2 * x + 1 for x in states))
    assert not torch.equal(second, expected)
    assert torch.equal(first, expected)


@torch.no_grad()
def test_the_graphs_that_are_held_are_bounded(launched):
    heads, tensors = heads_and_tensors()
    made, compiled = graphs.Graphs(torch.device("cpu"), kept=3), []
    build = made._package
    made._package = lambda *arguments: compiled.append(1) or build(*arguments)
    for width in (1, 2, 1, 3, 4, 1, 2):  # 2 went when 4 came, for 1 was used since
        fixed = (width, *FIXED[1:])
        assert torch.equal(made.call(fixed, heads, fixed, *tensors), heads(*fixed, *tensors))
    assert len(made._graphs) == 3 and len(compiled) == 5
