"""The training benchmark at shapes that take no time: what it measures, in which order, and what it says."""

import dataclasses
import functools
import json
import sys

import pytest
import torch

from cognica_poe.bench.processes import interleaved, median_row
from cognica_poe.bench.training import Workload, make_recipe, make_workloads, run_workloads, time_steps
from cognica_poe.cli.main import dispatch
from cognica_poe.errors import UserError
from cognica_poe.planning.costs import Costs
from cognica_poe.planning.machine import product_rate
from cognica_poe.training.build import build_model

TINY = {"rows": 2, "micro_rows": 1, "vocab": 300, "length": 16, "warmup": 1, "steps": 2}

# What a nanochat checkout offers to the benchmark, over one linear layer.
CHECKOUT = """
from dataclasses import dataclass
import os, torch
from torch import nn

@dataclass
class GPTConfig:
    sequence_len: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_kv_head: int = 1
    n_embd: int = 8
    window_pattern: str = "L"

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert torch.empty(0).device.type == "meta" and os.environ["NANOCHAT_DTYPE"] == "float32"
        print("chatter on stdout")
        self.wte, self.head = nn.Embedding(config.vocab_size, 8), nn.Linear(8, config.vocab_size)
        self.calls = []
        GPT.last = self

    def init_weights(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def setup_optimizer(self, weight_decay):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, ids, targets):
        self.calls.append(tuple(ids.shape))
        return nn.functional.cross_entropy(self.head(self.wte(ids)).flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def small_products(monkeypatch):
    rate = functools.partial(product_rate, size=256)
    monkeypatch.setattr("cognica_poe.bench.training.product_rate", rate)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "__init__.py").write_text("")
    (tmp_path / "nanochat" / "gpt.py").write_text(CHECKOUT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("NANOCHAT_DTYPE", "unset")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "nanochat"]:
        del sys.modules[name]


@pytest.mark.parametrize("mode", ["none", "flat", "hier"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_workload_reports_what_was_asked_for(mode, dtype, small_products):
    row = time_steps(Workload("cognica-poe", mode, "4x64", dtype, False, keep_freed_memory=False, **TINY))
    for key in ("name", "poe_mode", "shape", "dtype", "compile", "tokens_per_s", "gemm_peak_fraction"):
        assert key in row
    assert row["poe_mode"] == mode and row["dtype"] == dtype and row["tokens_per_step"] == 32
    assert row["peak_memory_bytes"] > 10 * 2**20
    assert row["tokens_per_s"] == pytest.approx(32 / row["step_seconds"])
    achieved = row["flops_per_token"] * row["tokens_per_s"]
    assert row["gemm_peak_fraction"] == pytest.approx(achieved / row["gemm_flops_per_s"])
    assert 0 < row["gemm_peak_fraction"] < 1 and 0 < row["update_share"] < 1
    json.dumps(row)


def test_shapes_are_those_of_the_name():
    recipe = make_recipe(Workload("x", "flat", "9x128", "float32", False))
    assert recipe.model.poe_stage_layers == (2, 2, 3, 2) and recipe.model.num_attention_heads == 2
    assert build_model(recipe.model).num_parameters() == Costs(recipe).parameters
    plain = make_recipe(Workload("x", "none", "9x128", "float32", False))
    assert plain.model.poe_stage_layers == (9,) and not plain.model.per_stage_head
    with pytest.raises(UserError, match="4x256"):
        make_recipe(dataclasses.replace(Workload("x", "flat", "9by128", "float32", False)))
    with pytest.raises(UserError, match="at least 4 layers"):
        make_recipe(Workload("x", "flat", "2x128", "float32", False))


def test_four_heads_cost_what_they_cost():
    """Work beyond the plain model's is three products with the vocabulary per token, forward and backward."""
    flat, none = (Costs(make_recipe(Workload("x", mode, "4x256", "float32", False))) for mode in ("flat", "none"))
    assert flat.flops_per_token() - none.flops_per_token() == 6 * 3 * 32768 * 256


def test_nanochat_is_driven_through_its_own_interface(checkout, capsys, small_products):
    row = time_steps(Workload("nanochat", "none", "4x64", "float32", False, nanochat=str(checkout), **TINY))
    from nanochat.gpt import GPT

    assert GPT.last.calls == [(1, 16)] * (1 + 2 * 2)  # one micro-batch to warm up, two in each of two measured steps
    assert row["name"] == "nanochat" and row["tokens_per_s"] > 0
    assert "chatter" not in capsys.readouterr().out
    workloads = make_workloads(["4x64"], ["none", "flat"], ["float32"], False, checkout)
    assert [(workload.name, workload.poe_mode) for workload in workloads] == [
        ("nanochat", "none"),
        ("cognica-poe", "none"),
        ("cognica-poe", "flat"),
    ]


def test_a_folder_without_nanochat_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"no nanochat checkout \(nanochat/gpt.py is missing\)"):
        make_workloads(["4x64"], ["none"], ["float32"], False, tmp_path)


def test_rows_are_medians_and_say_what_they_are_compared_with(monkeypatch):
    def fake(module, workloads, rounds, log):
        assert rounds == 3 and module == "cognica_poe.bench.training"
        speeds = {("nanochat", "none"): 100.0, ("cognica-poe", "none"): 120.0, ("cognica-poe", "flat"): 60.0}
        return [{**c, "tokens_per_s": speeds[c["name"], c["poe_mode"]], "flops_per_token": 10} for c in workloads]

    monkeypatch.setattr("cognica_poe.bench.training.interleaved", fake)
    workloads = [Workload(n, m, "4x64", "float32", True) for n, m in (("nanochat", "none"), ("cognica-poe", "none"))]
    rows = run_workloads([*workloads, Workload("cognica-poe", "flat", "4x64", "float32", True)], 3, print)
    assert "relative_speed" not in rows[0]
    assert rows[1]["relative_speed"] == 1.2 and rows[1]["relative_to"] == "nanochat none"
    assert rows[2]["relative_speed"] == 0.5 and rows[2]["relative_to"] == "cognica-poe none"
    runs = [{"tokens_per_s": speed, "peak_memory_bytes": 5, "name": "x"} for speed in (3.0, 1.0, 8.0)]
    assert median_row(runs) == {
        "tokens_per_s": 3.0,
        "peak_memory_bytes": 5,
        "name": "x",
        "spread": [1.0, 8.0],
        "rounds": 3,
    }


def test_processes_are_interleaved(monkeypatch):
    order = []

    def fake(module, workload, what):
        order.append(workload["name"])
        return {"tokens_per_s": 1.0, "peak_memory_bytes": 1}

    monkeypatch.setattr("cognica_poe.bench.processes.run_alone", fake)
    interleaved("m", [{"name": n, "shape": "s", "dtype": "d"} for n in "ab"], 3, lambda line: None)
    assert order == list("ababab")


def test_the_product_rate_is_a_rate():
    assert 1e7 < product_rate(torch.float32, torch.device("cpu"), size=128) < 1e14


def test_the_command_runs_its_workloads_in_processes(capsys):
    options = "--shapes 4x64 --modes flat --dtypes float32 --vocab 300 --length 16 --rows 2 --rounds 1 --steps 1"
    dispatch(["bench", "train", *options.split(), "--compile", "off", "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    (row,) = result["rows"]
    assert row["poe_mode"] == "flat" and row["rounds"] == 1 and row["compile"] is False
    assert "nanochat: not compared" in printed.err and result["skipped"]


def test_bf16_is_left_out_where_it_is_no_faster(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "cognica_poe.bench.training.run_workloads", lambda workloads, *rest: asked.append(workloads) or []
    )
    for fastest, expected in ((torch.float32, ["float32"]), (torch.bfloat16, ["float32", "bfloat16"])):
        monkeypatch.setattr("cognica_poe.training.precision.choose_compute_dtype", lambda *_, f=fastest: f)
        dispatch(["bench", "train", "--shapes", "4x64", "--modes", "none", "--json"])
        assert [workload.dtype for workload in asked[-1]] == expected
    dispatch(["bench", "train", "--shapes", "4x64", "--modes", "none", "--dtypes", "bfloat16", "--json"])
    assert [workload.dtype for workload in asked[-1]] == ["bfloat16"]


def test_mistakes():
    with pytest.raises(UserError, match="--rounds is 0"):
        dispatch(["bench", "train", "--rounds", "0"])
    with pytest.raises(UserError, match="failed"):
        interleaved("cognica_poe.bench.nothing", [{"name": "x", "shape": "s", "dtype": "d"}], 1, lambda line: None)
