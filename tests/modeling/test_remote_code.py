"""A saved model runs from its own folder, without this package."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from cognica_poe import modeling
from tests.conftest import make_model

CLEAN_ROOM = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cognica_poe":
            raise ImportError("cognica_poe is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float64)
ids = torch.arange(1, 21).view(2, 10)
options = {"max_new_tokens": 8, "pad_token_id": 0}
print(json.dumps({
    "stages": config.num_stages,
    "generate": model.generate(ids, do_sample=False, **options).tolist(),
    "speculative": model.generate_speculative(ids, **options).tolist(),
    "wand": model.generate_wand(ids, **options).tolist(),
    "modules": sorted(name for name in sys.modules if name.startswith("cognica_poe")),
}))
"""


def test_a_saved_model_needs_only_its_folder(tmp_path):
    model = make_model(poe_wand_p99_bounds_per_stage_head=[0.5, 0.25])
    model.save_pretrained(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert names == {path.name for path in Path(modeling.__file__).parent.glob("*_cognica_poe.py")}
    run = subprocess.run(
        [sys.executable, "-c", CLEAN_ROOM, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    ids, options = torch.arange(1, 21).view(2, 10), {"max_new_tokens": 8, "pad_token_id": 0}
    assert found["modules"] == []
    assert found["stages"] == 3
    assert found["generate"] == model.generate(ids, do_sample=False, **options).tolist()
    assert found["speculative"] == found["generate"]
    assert found["wand"] == model.generate_wand(ids, **options).tolist()
