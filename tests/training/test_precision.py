"""Which dtype the products take: what is asked for, else what the device multiplies faster."""

import pytest
import torch

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
