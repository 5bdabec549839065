"""Load a release the way a stranger does: another process, another folder, no network, this package out of reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cognica_poe.errors import UserError
from cognica_poe.leftovers import scratch_folder

_PROGRAM = """
import json, sys
sys.modules["cognica_poe"] = None  # importing it raises: the release must stand alone
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
where = job["where"]
tokenizer = AutoTokenizer.from_pretrained(job["source"], trust_remote_code=True, **where)
model = AutoModelForCausalLM.from_pretrained(job["source"], trust_remote_code=True, dtype="auto", **where).eval()
ids = torch.tensor([job["ids"]])
with torch.no_grad():
    logits = model(input_ids=ids).logits
first = tokenizer("text", add_special_tokens=True).input_ids[0]
out = {"logits": logits.contiguous(), "bos": torch.tensor([first, tokenizer.bos_token_id])}
assert type(model).__module__.startswith("transformers_modules."), "the code did not come from the release"
save_file(out, job["out"])
"""
_KEPT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")


def logits_in_clean_process(
    source: str | Path, ids: Sequence[int], *, revision: str | None = None, cache_dir: Path | None = None
) -> torch.Tensor:
    """Logits [1, T, V] that ``AutoModelForCausalLM`` gives for ``ids`` in a fresh, offline ``python -I``.

    ``source``: a release folder, or a repository id with ``revision`` and ``cache_dir``. Raises UserError with the last
    line of the process's error when the release does not load there, or its tokenizer does not prepend BOS.
    """
    from safetensors import safe_open

    where = {} if cache_dir is None else {"revision": revision, "cache_dir": str(Path(cache_dir).resolve())}
    with scratch_folder() as scratch:
        out = scratch / "out.safetensors"
        job = {
            "source": str(Path(source).resolve()) if cache_dir is None else str(source),
            "where": {**where, "local_files_only": True},
            "ids": list(ids),
            "threads": torch.get_num_threads(),
            "out": str(out),
        }
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        environment |= {"HF_HOME": str(scratch), "HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", "-c", _PROGRAM, json.dumps(job)]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{source} does not load in a clean process: {last}")
        with safe_open(out, framework="pt") as stored:
            first, bos = stored.get_tensor("bos").tolist()
            if first != bos:
                raise UserError(f"the tokenizer of {source} does not prepend BOS (id {bos}); it starts with {first}")
            return stored.get_tensor("logits")
