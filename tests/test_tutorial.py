"""Every command of the tutorial runs, in its order, in a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    assert len(BLOCKS) == 6
    program = f"{sys.executable} -m cognica_poe.cli"
    for language, text in BLOCKS:
        if language == "python":
            command = [sys.executable, "-c", text]
        else:  # make run is its second half here: the environment stands
            text = text.replace("make run", f"{program} run tiny --out runs/tiny")
            command = ["sh", "-ec", text.replace(".venv/bin/cognica-poe", program)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
    assert (tmp_path / "runs" / "compare.html").is_file()
