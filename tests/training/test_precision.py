"""Which dtype the products take and which attention trains: what is asked for, else what suits the device."""

import pytest
import torch

from cognica_poe.errors import UserError
from cognica_poe.training import precision

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_what_the_recipe_names_is_taken_anywhere():
    for name in ("float32", "bfloat16"):
        assert precision.choose_compute_dtype(name, CUDA) == precision.choose_compute_dtype(name, CPU)
        assert precision.choose_compute_dtype(name, CPU) == getattr(torch, name)


def test_cuda_with_instructions_for_bf16_needs_no_timing(monkeypatch):
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return True

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(precision, "_product_seconds", lambda *_: pytest.fail("a small product's time is noise"))
    assert precision.choose_compute_dtype("auto", CUDA) == torch.bfloat16
    assert asked == [False]  # what is emulated does not count


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, torch.bfloat16), (0.9, torch.float32), (3.0, torch.float32)])
@pytest.mark.parametrize("device", [CUDA, CPU])
def test_elsewhere_bf16_must_be_much_faster(monkeypatch, device, seconds, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    times = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(precision, "_product_seconds", lambda dtype, _: times[dtype])
    assert precision.choose_compute_dtype("auto", device) == expected


def test_a_product_on_the_processor_takes_time():
    assert 0 < precision._product_seconds(torch.float32, CPU) < 10


@pytest.mark.parametrize(
    ("device", "capability", "head_dim", "expected"),
    [
        (CUDA, (9, 0), 128, "flex_attention"),
        (CUDA, (8, 0), 16, "flex_attention"),
        (CUDA, (9, 0), 8, "sdpa"),
        (CUDA, (7, 5), 128, "sdpa"),
        (CPU, None, 128, "sdpa"),
    ],
)
def test_attention_by_itself_leaves_out_what_windows_hide_where_that_trains(
    monkeypatch, device, capability, head_dim, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.choose_attention("auto", device, head_dim) == expected
    assert precision.choose_attention("sdpa", device, head_dim) == "sdpa"


def test_flex_attention_is_refused_where_it_cannot_train():
    assert precision.choose_attention("flex_attention", CUDA, 64) == "flex_attention"
    with pytest.raises(UserError, match="trains on CUDA alone; use sdpa"):
        precision.choose_attention("flex_attention", CPU, 64)
