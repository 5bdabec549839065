"""Every public path on a CUDA device that has shapes and no values: nothing stays on the host, nobody waits unasked.

All of it runs on fake tensors (``tests/fakecuda``), in one process of its own; no GPU takes part. A path fails where an
operation is given tensors of two devices, or one that the kernel of a GPU would refuse.
"""

import functools
import json
import subprocess
import sys

import pytest

from cognica_poe.modeling.graphs_cognica_poe import has_compiler
from tests.fakecuda import build
from tests.fakecuda.names import DECODING, FAULTS, RELEASING, TRAINING

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

STEP = {"to device, pinned": 1, "to host, in passing": 2}
"""What a training step copies, without waiting: its rows there; losses and the guard's view back."""
PER_TOKEN = {
    "full": {"read": 1, "to device": 1},
    "prefix": {"read": 1, "to device": 1},
    "stage": {"read": 1, "to device": 1},
    "parallel": {"read": 1, "to device": 1},
    "wand, first exit": {"read": 2, "to device": 2},
    "wand, no exit": {"read": 2, "to device": 3},
    # One draft of a round is kept, so that a round gives two tokens: one read and seven small tables each.
    "speculative stage": {"read": 0.5, "to device": 3.5},
    "speculative int8": {"read": 0.5, "to device": 3.5},
    "speculative int4": {"read": 0.5, "to device": 3.5},
    "speculative lookup": {"read": 1, "to device": 3.5},
    "sampled full": {"read": 1, "to device": 2},
    "sampled speculative": {"read": 2.5, "to device": 6.5},
}
"""Waits of the host in decoding a token of one text: values read, and tables of places sent out of pageable memory."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fakecuda")
    command = [sys.executable, "-m", "tests.fakecuda", build.guard(folder), folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def path(found):
    def get(name):
        report = found["paths"][name]
        assert "error" not in report, f"{name}: {report['error']}"
        products = report["products"]
        assert products.get("cuda", 0) > 10 and not products.get("cpu"), f"{name} multiplies on {products}"
        return report

    return get


def test_every_path_runs_there(found, path):
    assert found["paths"].keys() == {*TRAINING, *RELEASING, *(f"decode {name}" for name in DECODING)}
    for name in found["paths"]:
        path(name)
    products = sum(report["products"]["cuda"] for report in found["paths"].values())
    print(f"paths run on the fake device: {len(found['paths'])}, with {products} products there and 0 on the processor")


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_step_waits_for_nothing(path, name):
    report = path(name)
    assert len(report["steps"]) >= 2
    for step in report["steps"]:
        assert step.pop("waits") == 0
        assert step == STEP
    assert report["weights"] == ["cuda"]
    assert report["state"] == [
        f"{kind}.cuda" for kind in ("exp_avg", "exp_avg_sq", "momentum", "second_moment", "step")
    ]
    print(f"{name}: {len(report['steps'])} steps, 0 waits each")


def test_a_run_goes_on_and_goes_back(path):
    assert path("resume")["reached"] == path("roll back")["reached"] == 10
    assert path("roll back")["rolled back"] == 1
    assert path("train flat, released")["saved"] == [2]


def test_a_release_is_measured_on_the_device(path):
    assert path("analyze")["device"] == path("calibrate")["device"] == path("generate")["device"] == "cuda"
    assert path("analyze")["release"] == "step-6"


@pytest.mark.parametrize("name", DECODING)
def test_a_decoded_token_waits_as_often_as_is_known(path, name):
    report = path(f"decode {name}")
    assert report["device"] == "cuda"
    assert report["per token"] == PER_TOKEN[name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(found, name):
    """Each of these fixes was taken back, or each of these moves forgotten, and a check above must say so."""
    report = found["faults"][name]
    if "error" in report:
        assert FAULTS[name] in report["error"], report["error"]
        return
    checks = {
        "products": functools.partial(_on_the_device, report),
        "waits": functools.partial(_without_waits, report),
    }
    with pytest.raises(AssertionError):
        checks[FAULTS[name]]()


def _on_the_device(report):
    assert not report["products"].get("cpu")


def _without_waits(report):
    assert all({**step, "waits": 0} == {**STEP, "waits": 0} for step in report["steps"])
