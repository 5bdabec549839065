"""The model that decodes is the model: every mode writes its text, or names what it cannot take."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from cognica_poe.modeling.engine_cognica_poe import Engines
from tests.conftest import make_model
from tests.modeling.test_speculation import agreeing_model
from tests.modeling.test_weights import CALLS, IDS, WIDE, flat, merge

TARGETS = ["c_q", "c_k", "c_v", "c_proj", "c_fc"]


def average(model, rate=0.5):
    for parameter, other in zip(model.parameters(), make_model(7, **WIDE).parameters(), strict=True):
        parameter.data.lerp_(other.detach().to(parameter.dtype), rate)


def swap_average(model):
    """Weights exchanged with an average for evaluation, as trainers do: the storages change hands."""
    for parameter in model.parameters():
        parameter.data = (parameter.data.float() * 0.7 + 0.05).to(parameter.dtype)


def write_by_numpy(model):
    for head in (model.lm_head, *model.lm_head_stages):
        bits = head.weight.detach().view(torch.uint8).numpy()
        bits[:] = bits[::-1].copy()


def scale_by_foreach(model):
    torch._foreach_mul_([block.mlp.c_fc.weight.data for block in model.transformer.h], 1.5)
    torch._foreach_mul_([block.attn.c_v.weight.data for block in model.transformer.h], -1.0)


def copy_by_foreach(model):
    parameters = [p.data for p in model.parameters()]
    torch._foreach_copy_(parameters, [p.detach().to(parameters[0].dtype) for p in make_model(4, **WIDE).parameters()])


@torch.no_grad()
def copy_in_place(model):
    for block in model.transformer.h:
        block.mlp.c_proj.weight.copy_(block.mlp.c_proj.weight.flip(0))


def step(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()


def step_fused(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()


CHANGES = {
    "average by .data": average,
    "average swapped in": swap_average,
    "merge by .data": merge,
    "numpy": write_by_numpy,
    "foreach scale": scale_by_foreach,
    "foreach copy": copy_by_foreach,
    "copy_ without gradients": copy_in_place,
    "optimiser step": step,
    "fused step": step_fused,
    "load_state_dict": lambda model: model.load_state_dict(agreeing_model(9, **WIDE).state_dict()),
    "swapped storage": lambda m: setattr(m.lm_head.weight, "data", torch.flip(m.lm_head.weight.data, (0,))),
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
def test_text_is_that_of_a_fresh_model_with_the_weights_of_now(dtype):
    tried, equal = 0, 0
    for mode, call in CALLS.items():
        model = agreeing_model(0, dtype=dtype, **WIDE)
        before, differs = flat(call(model)), 0
        for name, change in CHANGES.items():
            change(model)
            found, fresh = flat(call(model)), flat(call(copy.deepcopy(model)))
            assert found == fresh, (mode, name)
            tried, equal, differs = tried + 1, equal + (found == fresh), differs + (found != before)
            before = found
        assert differs >= len(CHANGES) - 4, mode  # a stage does not see the heads of others
    print(f"weights changed: tried {tried}, equal {equal}, refused 0")


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted():
    """A model under a real adapter whose matrices are away from zero, and the wrapper."""
    peft = pytest.importorskip("peft")
    model = agreeing_model(0, dtype=torch.float32, **WIDE)
    CALLS["full"](model)  # an engine of the plain weights is there
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    return model, wrapped.eval()


def refused(call, model) -> str:
    with pytest.raises(ValueError) as caught:
        call(model)
    text = str(caught.value)
    assert "\n" not in text and "merge_and_unload" in text and "leave out poe_mode" in text
    return text


def test_an_adapter_is_refused_by_every_mode_until_it_is_merged(adapted):
    model, wrapped = adapted
    for mode, call in CALLS.items():
        assert "transformer.h.0.attn.c_q is a Linear" in refused(call, model), mode
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_q"):
        wrapped.generate(input_ids=IDS, poe_mode="full", max_new_tokens=2)
    adapter_text = wrapped.generate(input_ids=IDS, do_sample=False, max_new_tokens=16)  # the modules as they are
    wrapped.merge_adapter()  # the modules stay in place: still refused by name, though the weights hold the adapter
    assert "c_q is a Linear" in refused(CALLS["full"], model)
    wrapped.unmerge_adapter()
    merged = wrapped.merge_and_unload()
    equal = 0
    for mode, call in CALLS.items():
        fresh = make_model(dtype=torch.float32, **WIDE)
        fresh.load_state_dict(merged.state_dict())
        assert flat(call(merged)) == flat(call(fresh)), mode
        equal += 1
    assert torch.equal(CALLS["full"](merged), adapter_text)
    print(f"adapters: tried {2 * len(CALLS) + 2}, equal {equal}, refused {len(CALLS) + 2}")


# ---- quantised and offloaded layers ---------------------------------------------------------------------------------


class Int8(nn.Module):
    """A layer with 8-bit weights and a scale per output, as quantisers put in the place of a linear one."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        scale = base.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantise(model):
    for block in model.transformer.h:
        block.mlp.c_fc = Int8(block.mlp.c_fc)
    return model


def quantise_one_weight(model):
    layer = model.transformer.h[1].attn.c_v
    layer.weight = nn.Parameter((layer.weight.detach() * 10).to(torch.int8), requires_grad=False)
    return model


def offload_to_memory(model, folder):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_disk(model, folder):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


FOREIGN = {
    "int8 layers": (lambda model, folder: quantise(model), "transformer.h.0.mlp.c_fc is a Int8"),
    "int8 weight": (lambda model, folder: quantise_one_weight(model), "transformer.h.1.attn.c_v has a"),
    "offloaded to memory": (offload_to_memory, "has a forward of its own (offloaded?)"),
    "offloaded to disk": (offload_to_disk, "has a forward of its own (offloaded?)"),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_quantised_and_offloaded_layers_are_refused_by_name(change, message, tmp_path):
    model = agreeing_model(0, dtype=torch.float32, **WIDE)
    CALLS["full"](model)
    model = change(model, tmp_path)
    for call in CALLS.values():
        assert message in refused(call, model)
    print(f"tried {len(CALLS)}, equal 0, refused {len(CALLS)}")


def test_a_device_map_of_one_device_decodes(tmp_path):
    pytest.importorskip("accelerate")
    model = agreeing_model(0, dtype=torch.float32, **WIDE)
    model.save_pretrained(tmp_path)
    for where in ({"": "cpu"}, "cpu"):
        mapped = type(model).from_pretrained(tmp_path, device_map=where)
        for call in CALLS.values():
            assert flat(call(mapped)) == flat(call(model))
    print(f"device_map: tried {2 * len(CALLS)}, equal {2 * len(CALLS)}, refused 0")


# ---- memory ---------------------------------------------------------------------------------------------------------


def held(model) -> float:
    """Bytes of weights that the engines hold beside the model's own, relative to the model."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    parts = {id(part): part for engine in Engines.attached(model).made.values() for part in engine.parts}
    buffers = [buffer for part in parts.values() for buffer in part.buffers(recurse=False)]
    size = {b.data_ptr(): b.numel() * b.element_size() for b in buffers if b.data_ptr() not in own}
    packed = [p for part in parts.values() if (p := getattr(part, "packed", None)) is not None]
    total = sum(size.values()) + sum(p.numel() * p.element_size() for p in packed)
    return total / sum(p.numel() * p.element_size() for p in model.parameters())


def test_engines_hold_no_more_than_the_model_and_go_with_it():
    model = agreeing_model(0, dtype=torch.bfloat16, **WIDE)
    CALLS["full"](model)
    first = held(model)
    for batch in (1, 2, 3, 5, 9):
        for stages in (1, 2, 3):
            model.generate_prefix(IDS[:1].expand(batch, -1), stages, max_new_tokens=2 * batch)
    assert held(model) == first <= 1  # a prefix is the beginning of the same engine
    for call in CALLS.values():
        call(model)
    assert held(model) < 2 and len(Engines.attached(model).made) == 3
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        CALLS["full"](model)
        assert len(Engines.attached(model).made) == 1  # those of other weights are gone
    parts = [weakref.ref(part) for engine in Engines.attached(model).made.values() for part in engine.parts]
    weight = weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert weight() is None and not any(part() for part in parts)
