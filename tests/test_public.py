"""What ``import cognica_poe`` gives, and that it costs nothing until it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

import cognica_poe

LIGHT = """
import sys
import cognica_poe
assert set(cognica_poe.__all__) <= set(dir(cognica_poe))
assert "torch" not in sys.modules and "transformers" not in sys.modules
config = cognica_poe.CognicaPoEConfig
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
assert config is CognicaPoEConfig
"""


def test_importing_the_package_imports_no_torch():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_those_of_their_modules():
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
    from cognica_poe.release.loading import load

    assert cognica_poe.load is load and cognica_poe.CognicaPoEForCausalLM is CognicaPoEForCausalLM
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        cognica_poe.laod  # noqa: B018


def test_the_package_is_typed():
    assert (Path(cognica_poe.__file__).parent / "py.typed").is_file()
