"""Decoding works with the weights that the model has now, whatever way they came about, or says why it cannot."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from cognica_poe.modeling import graphs_cognica_poe as graphs
from cognica_poe.modeling.drafting_cognica_poe import DRAFTERS
from cognica_poe.modeling.engine_cognica_poe import ENGINES, Engine, Engines
from cognica_poe.modeling.weights_cognica_poe import digest, grid_digest, plain_weights, segment_of
from tests.conftest import make_model
from tests.modeling.test_speculation import agreeing_model

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
IDS = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))
SPECULATIVE = {
    f"speculative {name}": lambda model, name=name: model.generate_speculative(
        IDS, 0, 4, return_acceptance=True, drafter=name, max_new_tokens=16
    )
    for name in DRAFTERS
}
CALLS = {
    "full": lambda model: model.generate(IDS, poe_mode="full", max_new_tokens=16),
    "prefix": lambda model: model.generate_prefix(IDS, 2, max_new_tokens=16),
    "stage": lambda model: model.generate_stage(IDS, 1, max_new_tokens=16),
    "wand": lambda model: model.generate_wand(IDS, p99_bounds=[0.3, 0.2], return_stages_used=True, max_new_tokens=16),
    "parallel": lambda model: model.generate_parallel_composition(IDS, [0, 2], max_new_tokens=16),
    **SPECULATIVE,
}


def flat(answer) -> list:
    """An answer of a mode as lists and numbers."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    return [part.tolist() if isinstance(part, torch.Tensor) else part for part in parts]


def merge(model, name="c_q"):
    for block in model.transformer.h:
        weight = getattr(block.attn, name).weight
        generator = torch.Generator().manual_seed(3)
        low, high = (torch.randn(shape, generator=generator) for shape in ((len(weight), 4), (4, weight.shape[1])))
        weight.data += 0.5 * (low @ high).to(weight.dtype)


def test_one_changed_element_is_noticed_wherever_an_engine_copied_it():
    model = agreeing_model(0, dtype=torch.bfloat16, **WIDE)
    for call in CALLS.values():
        call(model)
    copied = list(Engines.of(model).digests)
    assert {"lm_head.weight", "transformer.h.4.attn.c_v.weight", "transformer.h.0.mlp.c_proj.weight"} <= set(copied)
    for name in copied:
        engine = Engines.of(model).get(model, "int8", 1), Engines.of(model).get(model)
        assert (Engines.of(model).get(model, "int8", 1), Engines.of(model).get(model)) == engine
        element = model.get_parameter(name).data[-1, 3:4]
        element.copy_(torch.nextafter(element, element + 1))
        CALLS["speculative int8"](model)
        assert Engines.of(model).get(model) is not engine[1], name


def test_what_is_read_in_place_needs_no_digest():
    model = agreeing_model(0, dtype=torch.float32, **WIDE)
    CALLS["full"](model)
    copied = {name.split(".")[-2] for name in Engines.of(model).digests}
    assert copied == {"c_q", "c_k", "c_v", "lm_head", "0", "1", "2"}  # one product of three, and folded heads
    CALLS["prefix"](make := copy.deepcopy(model))
    assert {segment_of(name, make.config) for name in Engines.of(make).digests} == {0, 1}


def test_nothing_is_arranged_anew_when_nothing_changed(monkeypatch):
    made, build = [], Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a, **k: (made.append(self), build(self, *a, **k))[1])
    model = agreeing_model(0, dtype=torch.bfloat16, **WIDE)
    answers = {name: flat(call(model)) for name, call in CALLS.items()}
    count = len(made)
    with torch.inference_mode():
        [p.data for p in model.parameters()]
        model.eval().to(torch.bfloat16).to("cpu")
        model.state_dict(), model(IDS)
    for name, call in CALLS.items():
        assert flat(call(model)) == answers[name]
    assert len(made) == count


def test_a_measured_drafter_is_forgotten_with_the_weights():
    model = agreeing_model(0, dtype=torch.float32, **WIDE)
    model.generate_speculative(IDS, drafter="auto", max_new_tokens=8)
    assert Engines.of(model).measured
    merge(model)
    assert not Engines.of(model).measured


@pytest.mark.slow
@pytest.mark.skipif(not graphs.has_compiler(), reason="no C++ compiler")
def test_a_graph_holds_no_weights_of_the_past(tmp_path, monkeypatch):
    """Machine code has all weights in it, the embeddings too."""
    monkeypatch.setattr(graphs, "cache_folder", lambda: tmp_path)
    model = agreeing_model(0, dtype=torch.float32, poe_stage_layers=[1], num_hidden_layers=1, **WIDE)
    model.prepare_decoding(compile=True)
    before = CALLS["full"](model)
    for weight in (model.transformer.wte.weight, model.transformer.h[0].mlp.c_fc.weight):
        weight.data.copy_(torch.randn_like(weight))
        found = CALLS["full"](model)
        fresh = copy.deepcopy(model)
        fresh.prepare_decoding(compile=True)
        assert torch.equal(found, CALLS["full"](fresh)) and not torch.equal(found, before)
        before = found


# ---- where engines live -------------------------------------------------------------------------------------------


def test_engines_are_freed_with_the_model():
    model = agreeing_model(0, dtype=torch.bfloat16, **WIDE)
    for call in CALLS.values():
        call(model)
    engines = [weakref.ref(engine) for engine in Engines.attached(model).made.values()]
    parts = [weakref.ref(engine().folded[0]) for engine in engines]
    assert len(engines) == 3  # as trained, and two quantised drafters
    del model
    gc.collect()
    assert not any(ref() for ref in engines) and all(ref() is None for ref in parts)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_have_engines_of_their_own(duplicate):
    model = agreeing_model(0, dtype=torch.float32, **WIDE)
    expected = CALLS["full"](model)
    other = duplicate(model)
    assert ENGINES not in vars(other) and ENGINES in vars(model)
    other.prepare_decoding(width=3)
    assert torch.equal(CALLS["full"](other), expected)
    assert (Engines.of(model).get(model).width, Engines.of(other).get(other).width) == (1, 3)


def test_files_hold_no_engines(tmp_path):
    model = agreeing_model(0, dtype=torch.float32, **WIDE)
    sizes, names = [], set(model.state_dict())
    for _ in range(2):
        model.save_pretrained(tmp_path)
        torch.save(model, whole := io.BytesIO())
        sizes.append((whole.tell(), (tmp_path / "model.safetensors").stat().st_size))
        expected = CALLS["full"](model)
    assert sizes[0] == sizes[1] and set(model.state_dict()) == names
    whole.seek(0)
    loaded = torch.load(whole, weights_only=False)
    assert ENGINES not in vars(loaded) and torch.equal(CALLS["full"](loaded), expected)


# ---- what cannot be taken -----------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """As an adapter's layer: the weight is that of the layer below, the result is not."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Wrapper(nn.Module):
    """As an adapter's model around ours."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_model = base

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


class Counted(nn.Linear):
    """A layer that may compute anything."""


class Marked(torch.Tensor):
    """A tensor that stands for another one, as quantised weights do."""


def replace(name: str, make):
    owner, _, last = name.rpartition(".")

    def change(model):
        module = model.get_submodule(owner)
        setattr(module, last, make(getattr(module, last)))

    return change


def become(layer: nn.Module, kind: type) -> nn.Module:
    layer.__class__ = kind
    return layer


def reparametrise(model):
    nn.utils.parametrize.register_parametrization(model.transformer.h[2].attn.c_q, "weight", nn.Identity())


def subclass(model):
    weight = model.transformer.wte.weight
    model.transformer.wte.weight = nn.Parameter(weight.detach().as_subclass(Marked), requires_grad=False)


def offload(model):
    layer = model.transformer.h[1].attn.c_v
    layer.forward = layer.forward


WEIGHTS = [f"transformer.h.1.{path}" for path in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj")]
WEIGHTS += [f"transformer.h.1.{path}" for path in ("mlp.c_fc", "mlp.c_proj")]
WEIGHTS += ["transformer.h.0.attn.ve_gate", "smear_gate", "lm_head", "lm_head_stages.1"]
REFUSED = {
    **{name: (replace(name, LowRank), f"{name} is a LowRank") for name in WEIGHTS},
    "subclass": (replace("transformer.h.3.mlp.c_fc", lambda m: become(m, Counted)), "h.3.mlp.c_fc is a Counted"),
    "embedding": (replace("value_embeds.2", lambda m: become(m, Counted)), "value_embeds.2 is a Counted"),
    "block": (replace("transformer.h.3", nn.Sequential), "transformer.h.3 is a Sequential"),
    "hook": (lambda m: m.lm_head.register_forward_hook(lambda *a: None), "lm_head has a forward hook"),
    "prehook": (lambda m: m.transformer.h[1].register_forward_pre_hook(lambda *a: None), "transformer.h.1 has a forw"),
    "offload": (offload, "transformer.h.1.attn.c_v has a forward of its own"),
    "parametrised": (reparametrise, "transformer.h.2.attn.c_q is a ParametrizedLinear"),
    "bias": (lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(97))), "lm_head has a bias"),
    "tensor": (subclass, "transformer.wte holds a Marked as weight"),
    "meta": (lambda m: m.smear_gate.to("meta"), "smear_gate has its weight on the meta device"),
    "dtype": (lambda m: m.transformer.h[4].mlp.half(), "h.4.mlp.c_fc.weight is float16 on cpu, lm_head.weight float32"),
    "lambda": (lambda m: setattr(m, "x0_lambdas", nn.Parameter(m.x0_lambdas.double())), "x0_lambdas is float64"),
    "pruned": (lambda m: prune.identity(m.transformer.h[0].mlp.c_fc, "weight"), "h.0.mlp.c_fc has a forward"),
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m.lm_head), "lm_head is a ParametrizedLinear"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_models_own_plain_weight_is_refused_by_name(change, message):
    model = make_model(dtype=torch.float32)
    wrapped = Wrapper(model)
    model.generate_prefix(IDS, max_new_tokens=2)  # an engine of the plain weights is there
    change(model)
    with pytest.raises(ValueError) as caught:
        wrapped.generate(IDS, poe_mode="full", max_new_tokens=2)
    text = str(caught.value)
    assert message in text and "merge_and_unload" in text and "leave out poe_mode" in text and "\n" not in text


# ---- the digest ---------------------------------------------------------------------------------------------------


def changed(weight: torch.Tensor):
    """Changes that simple sums or parities do not see."""
    yield "negated", -weight
    yield "doubled", 2 * weight
    yield "rows", weight.flip(0)
    yield "columns", weight.flip(1)
    yield "shifted", weight.roll(1)
    for name, columns in (("odd", slice(1, None, 2)), ("even", slice(0, None, 2)), ("fourth", slice(3, None, 4))):
        other = weight.clone()
        other[:, columns] *= -1
        yield f"{name} columns negated", other
    other = weight.clone()
    other[:2] = weight[:2].flip(0)
    yield "two rows swapped", other
    other = weight.clone()
    other[:2, :2] *= -1
    yield "four signs", other


@pytest.mark.parametrize("digest", [digest, grid_digest])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (97, 33), (4, 1), (5000, 64)])
def test_every_change_of_bits_shows(digest, dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    first = digest(weight)
    assert torch.equal(first, digest(weight.clone()))
    assert torch.equal(first, digest(weight.T.contiguous().T))
    for name, other in changed(weight):
        assert torch.equal(weight, other) or not torch.equal(first, digest(other)), name
    bits = weight.clone().view(torch.uint8)
    for column in range(0, bits.shape[1], 7):
        bits[2, column] ^= 1 << column % 8
        assert not torch.equal(first, digest(bits.view(dtype)))
        bits[2, column] ^= 1 << column % 8


@pytest.mark.parametrize("digest", [digest, grid_digest])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchanges_between_equal_elements_show(digest, dtype):
    """Permutations of a unit matrix keep all sums over rows and over columns."""
    unit, generator = torch.eye(64, dtype=dtype), torch.Generator().manual_seed(0)
    digests = [digest(unit[torch.randperm(64, generator=generator)]) for _ in range(50)]
    digests += [digest(unit.roll(turn, 1)) for turn in range(64)]
    assert len({tuple(found.tolist()) for found in digests}) == 114


@pytest.mark.parametrize("digest", [digest, grid_digest])
def test_a_digest_does_not_ask_where_in_memory_the_weight_lies(digest):
    memory = torch.randn(1001)
    assert torch.equal(digest(memory[1:].view(10, 100)), digest(memory[1:].clone().view(10, 100)))
    half = memory.bfloat16()
    assert digest(half[1:].view(10, 100)).dtype == torch.int64  # a storage that begins between two of the integers
    vector = torch.randn(5, dtype=torch.bfloat16)
    assert not torch.equal(digest(vector), digest(vector.flip(0)))


def test_all_weights_are_taken_but_the_one_that_decoding_never_reads():
    model = make_model()
    assert set(dict(model.named_parameters())) - set(plain_weights(model)) == {"backout_lambda"}
    deepest = {stage: name for name in plain_weights(model) if (stage := segment_of(name, model.config)) >= 0}
    assert set(deepest) == {0, 1, 2}
