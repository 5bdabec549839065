"""Options of ``generate`` and ``serve``: each acts in the modes that read it and is refused in the others."""

import dataclasses

import pytest

from cognica_poe.cli.main import main
from cognica_poe.errors import UserError
from cognica_poe.serving.options import READS, GenerationOptions, ServerOptions

GIVEN = {
    "stages": 2,
    "stage": 1,
    "layer": 3,
    "stage_list": (0, 1),
    "safety": 2.0,
    "guarantee": 0.99,
    "k_draft": 3,
    "drafter": "int8",
}


def test_options_that_a_mode_does_not_read_are_refused():
    refused, taken = 0, 0
    for make, modes in ((GenerationOptions, READS), (ServerOptions, [None, *READS])):
        names = [name for name in GIVEN if name in {field.name for field in dataclasses.fields(make)}]
        for mode in [mode for mode in modes if not (mode == "parallel" and make is ServerOptions)]:
            for name in names:
                if name in READS.get(mode, ()):
                    assert getattr(make(mode=mode, **{name: GIVEN[name]}), name) == GIVEN[name]
                    taken += 1
                else:
                    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} does nothing with"):
                        make(mode=mode, **{name: GIVEN[name]})
                    refused += 1
    for name, value in {"top_k": 5, "top_p": 0.5, "seed": 1}.items():
        with pytest.raises(UserError, match="does nothing at --temperature 0"):
            GenerationOptions(**{name: value})
        assert getattr(GenerationOptions(temperature=0.5, **{name: value}), name) == value
    for make in (GenerationOptions, ServerOptions):
        with pytest.raises(UserError, match="--mode exit needs --layer"):
            make(mode="exit")
        with pytest.raises(UserError, match="--stage and --layer both say who drafts"):
            make(mode="speculative", stage=0, layer=3)
    read = {name for names in READS.values() for name in names}
    assert read == GIVEN.keys()
    assert read <= {field.name for field in dataclasses.fields(GenerationOptions)}
    print(f"options: taken {taken}, refused {refused + 3}")


def test_a_command_with_an_option_of_another_mode_ends_with_one_line(capsys):
    for words in (["generate", "nowhere", "text", "--stages", "2"], ["serve", "nowhere", "--stage", "1"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        out, err = capsys.readouterr()
        assert left.value.code == 2
        assert not out and len(err.strip().splitlines()) == 1 and "does nothing with" in err
