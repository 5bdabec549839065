"""A release stands alone, gives back the very weights and logits, and a damaged one is refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, write_manifest
from cognica_poe.release.export import REQUIRED, card_of, check_release, load_release
from cognica_poe.release.publish.clean_load import logits_in_clean_process
from tests.release.conftest import BOUNDS, add_line, record_of, release_model

IDS = [271, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121, 144, 169, 196, 225, 256, 3, 5, 8]


def test_a_clean_process_without_the_package_gives_the_same_logits(releases):
    model = release_model(300)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([IDS])).logits
    assert torch.equal(logits_in_clean_process(releases[2], IDS), expected)


@pytest.mark.slow
def test_clean_process_tells_why_a_release_does_not_load(releases, tmp_path):
    broken = shutil.copytree(releases[0], tmp_path / "broken")
    code = broken / "sampling_cognica_poe.py"
    code.write_text("from cognica_poe.files import sha256_file\n" + code.read_text())
    with pytest.raises(UserError, match="does not load in a clean process"):
        logits_in_clean_process(broken, IDS)


def test_folder_holds_what_a_stranger_needs(releases):
    release = check_release(releases[2])
    names = {file.name for file in releases[2].iterdir()}
    assert names >= set(REQUIRED)
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl", ".npz"))}
    assert release.config["poe_wand_p99_bounds_per_stage_head"] == BOUNDS
    assert release.config["auto_map"] == {
        "AutoConfig": "configuration_cognica_poe.CognicaPoEConfig",
        "AutoModelForCausalLM": "modeling_cognica_poe.CognicaPoEForCausalLM",
    }
    assert release.config["dtype"] == "float32"
    generation = json.loads((releases[2] / "generation_config.json").read_text())
    assert generation["bos_token_id"] == generation["eos_token_id"] == 271
    assert release.step == 300 and release.record["step"] == 300
    assert (releases[2] / "LICENSE").read_text().strip().startswith("Apache License")
    assert json.loads((releases[2] / "tokenizer_config.json").read_text())["model_max_length"] == 256


def test_code_and_tokenizer_are_the_same_bytes_in_every_step(releases):
    fixed = [name for name in (file.name for file in releases[0].iterdir()) if name.endswith(".py")]
    fixed += ["tokenizer.json", "tokenizer_config.json", "LICENSE", "generation_config.json"]
    assert len([name for name in fixed if name.endswith(".py")]) >= 3
    for name in fixed:
        assert len({(release / name).read_bytes() for release in releases}) == 1, name


def test_card_is_what_its_records_render_to(releases):
    for release in releases:
        assert (release / "README.md").read_text() == card_of(release)


def test_same_input_gives_the_same_folder(make_release, tmp_path):
    first, second = (make_release(tmp_path / name, step=100) for name in ("a", "b"))
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()


def test_export_leaves_the_model_as_it_was(make_release, tmp_path):
    model = release_model().train()
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    make_release(tmp_path / "a", model=model)
    assert model.training and model.dtype == torch.float32
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation


def test_half_precision_release_holds_rounded_weights(make_release, tmp_path):
    model = release_model()
    release = make_release(tmp_path / "half", model=model, dtype="bfloat16")
    assert check_release(release).config["dtype"] == "bfloat16"
    for name, tensor in load_file(release / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())
    loaded, tokenizer = load_release(release)
    assert loaded.dtype == torch.bfloat16
    assert tokenizer("the cat").input_ids[0] == tokenizer.bos_token_id == 271


def test_release_of_a_plain_arm_has_no_bounds(make_release, tmp_path):
    from tests.conftest import make_model

    model = make_model(3, torch.float32, vocab_size=280, poe_mode="none", poe_stage_layers=[5])
    record = record_of(model, 7)
    release = make_release(tmp_path / "plain", step=7, model=model, record=record, wand_bounds=[])
    assert check_release(release).config["poe_wand_p99_bounds_per_stage_head"] == []


def test_what_does_not_belong_together_is_refused(make_release, tokenizer_dir, tmp_path):
    model = release_model()
    cases = {
        "of step 100, not 300": {"record": record_of(model, 100)},
        "measured on other weights": {"record": record_of(release_model(5), 300)},
        "1 WAND bounds for 2 transitions": {"wand_bounds": [1.0]},
        "dtype 'int7' is not one of": {"dtype": "int7"},
    }
    for message, change in cases.items():
        with pytest.raises(UserError, match=message):
            make_release(tmp_path / "x", model=model, **change)
    with pytest.raises(UserError, match="not its tokenizer"):
        from tests.conftest import make_model

        make_release(tmp_path / "x", model=make_model(0, torch.float32, vocab_size=200))
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"


def test_a_folder_that_is_no_release_is_never_replaced(make_release, tokenizer_dir, tmp_path):
    for name in ("tokenizer", "documents"):
        out = tmp_path / name
        if name == "tokenizer":
            shutil.copytree(tokenizer_dir, out)
        else:
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")
        before = {file.name: file.read_bytes() for file in out.iterdir()}
        with pytest.raises(UserError, match="is not a release folder made by cognica-poe"):
            make_release(out, record={}, model=release_model())  # before the record is looked at
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "tokenizer"]


def test_a_release_is_replaced_and_has_one_manifest_of_all_files(make_release, tmp_path):
    for step in (100, 300):
        make_release(tmp_path / "release", step=step)
    release = check_release(tmp_path / "release")
    assert release.step == 300 and list(tmp_path.iterdir()) == [release.path]
    manifest = Manifest.read(release.path)
    assert manifest.kind == "release"
    assert {*manifest.digests, MANIFEST} == {
        path.relative_to(release.path).as_posix() for path in release.path.rglob("*")
    }


@pytest.mark.parametrize("step", ["100", "../../x", 100.0, -1, True, None, [100]])
def test_a_step_that_is_no_whole_number_is_refused(releases, tmp_path, step):
    folder = shutil.copytree(releases[1], tmp_path / "release")
    for name in ("release.json", "analysis.json"):
        described = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**described, "step": step}))
    write_manifest(folder, "release")
    with pytest.raises(UserError, match=r"release\.json: step is .* whole number"):
        check_release(folder)


@pytest.mark.parametrize("name", ["../../x", "/etc/hostname", "sub/x", "a\\b", ".."])
def test_a_name_that_leads_elsewhere_is_refused(releases, tmp_path, name):
    folder = shutil.copytree(releases[1], tmp_path / "release")
    add_line(folder / MANIFEST, f"{'0' * 64}  {name}")
    with pytest.raises(UserError, match=r"cannot be used as a name|is missing"):
        check_release(folder)


def test_weights_that_are_not_finite_are_not_released(make_release, tmp_path):
    model = release_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        make_release(tmp_path / "x", model=model)
    assert list(tmp_path.iterdir()) == []


def _flip(file, at=-3):
    data = bytearray(file.read_bytes())
    data[at] ^= 0x40
    file.write_bytes(bytes(data))


def test_damaged_folders_are_refused_in_one_line(releases, tmp_path):
    def remanifest(folder):
        write_manifest(folder, "release")

    damages = {
        "model.safetensors is corrupt": lambda folder: _flip(folder / "model.safetensors"),
        "config.json is corrupt": lambda folder: _flip(folder / "config.json"),
        "model.safetensors is missing": lambda folder: (folder / "model.safetensors").unlink(),
        f"has no {MANIFEST}": lambda folder: (folder / MANIFEST).unlink(),
        "is not in MANIFEST": lambda folder: (folder / "extra.py").write_text("print()"),
        "has no README.md": lambda folder: ((folder / "README.md").unlink(), remanifest(folder)),
        "no readable safetensors": lambda folder: (
            (folder / "model.safetensors").write_bytes(b"\x08" * 40),
            remanifest(folder),
        ),
        "is not valid JSON": lambda folder: ((folder / "analysis.json").write_text("{"), remanifest(folder)),
        "is no JSON object": lambda folder: ((folder / "release.json").write_text("[]"), remanifest(folder)),
        "the release of step 100": lambda folder: (
            (folder / "analysis.json").write_text('{"step": 7}'),
            remanifest(folder),
        ),
    }
    for index, (message, damage) in enumerate(damages.items()):
        folder = shutil.copytree(releases[1], tmp_path / str(index))
        damage(folder)
        with pytest.raises(UserError, match=message) as caught:
            check_release(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="release folder not found"):
        load_release(tmp_path / "none")
