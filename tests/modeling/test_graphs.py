"""Compiled decode functions: the same values as uncompiled ones, kept on disk, made again when damaged or outdated."""

import pytest
import torch

from cognica_poe.modeling import graphs_cognica_poe as graphs
from cognica_poe.modeling.engine_cognica_poe import Heads
from cognica_poe.modeling.linears_cognica_poe import DenseLinear
from tests.conftest import make_model

FIXED = (4, (0, 2), (0.5, 0.5), 0.0)
KEY = ("pool", 0)


def heads_and_tensors():
    model = make_model(dtype=torch.float32)
    states = [torch.randn(2, 64, model.config.hidden_size) for _ in range(2)]
    return Heads(model, 3, DenseLinear), (torch.tensor([[5, 9], [4, 2]]), *states)


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
        heads.heads[2].weight[0, 0] += 1
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
