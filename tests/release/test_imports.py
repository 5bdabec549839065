"""Foreign checkpoints: names are mapped, nothing is missing or unexpected, and no pickle is read unasked."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from cognica_poe.errors import UserError
from cognica_poe.release.export import load_release
from cognica_poe.release.imports import fit, import_checkpoint, mapped, read_foreign
from tests.conftest import make_model
from tests.release.conftest import VOCAB, release_model
from tests.runs import write_texts

HF = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
      "num_key_value_heads", "max_position_embeddings", "window_pattern", "short_window", "poe_stage_layers",
      "poe_mode")  # fmt: skip


def released(folder, model, prefix="", change=None):
    """A folder as others publish it: config.json of plain fields, weights under their names."""
    folder.mkdir()
    config = {name: getattr(model.config, name) for name in HF} | {"model_type": "theirs", "architectures": ["X"]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"{prefix}{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    save_file((change or (lambda tensors: tensors))(weights), folder / "model.safetensors")
    return folder


def nanochat(folder, model, change=None, step=42, **config):
    """model_N.pt and meta_N.json as nanochat's trainer writes them."""
    folder.mkdir()
    c = model.config
    described = {
        "vocab_size": c.vocab_size, "n_embd": c.hidden_size, "n_layer": c.num_hidden_layers,
        "n_head": c.num_attention_heads, "n_kv_head": c.num_key_value_heads, "sequence_len": c.max_position_embeddings,
        "window_pattern": c.window_pattern, **config,
    }  # fmt: skip
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": described}))
    weights = {f"_orig_mod.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save((change or (lambda tensors: tensors))(weights), folder / f"model_{step:06d}.pt")
    return folder


def plain_model():
    layers = make_model(0).config.num_hidden_layers
    changes = {"poe_mode": "none", "poe_stage_layers": [layers], "per_stage_head": False, "short_window": 0}
    return make_model(0, vocab_size=VOCAB, **changes)


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
def test_a_released_folder_gives_the_same_logits(tmp_path, prefix):
    model = release_model(3)
    found = fit(read_foreign(released(tmp_path / "step-1200", model, prefix)))
    ids = torch.arange(20)[None] % model.config.vocab_size
    with torch.no_grad():
        assert torch.equal(found.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert read_foreign(tmp_path / "step-1200").step == 1200


def test_nanochat_s_checkpoint_gives_the_same_logits(tmp_path):
    model = plain_model()
    folder = nanochat(tmp_path / "d2", model)
    found = read_foreign(folder, allow_pickle=True)
    assert found.step == 42 and found.config["poe_mode"] == "none"
    again = fit(found).eval()
    assert again.config.intermediate_size == model.config.intermediate_size
    ids = torch.arange(20)[None] % model.config.vocab_size
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5)
    kept = ("smear", "backout")
    older = nanochat(
        tmp_path / "old", model, lambda w: {n: t for n, t in w.items() if not any(word in n for word in kept)}
    )
    told: list[str] = []
    config = fit(read_foreign(older, allow_pickle=True), told.append).config
    assert config.qk_scale == 1.15 and "no smear and no backout" in told[0]


def test_a_padded_vocabulary_is_cut_to_its_tokens(tmp_path):
    model = plain_model()
    padded = -(-model.config.vocab_size // 64) * 64
    assert padded > model.config.vocab_size

    def pad(weights):
        rows = [name for name in weights if name.endswith(("wte.weight", "lm_head.weight")) or "value_embeds" in name]
        more = {name: weights[name].new_zeros(padded - len(weights[name]), weights[name].shape[1]) for name in rows}
        return {**weights, **{name: torch.cat([weights[name], more[name]]) for name in rows}}

    found = fit(read_foreign(nanochat(tmp_path / "p", model, pad), allow_pickle=True))
    assert torch.equal(found.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/cognica-poe-was-here",)


def test_no_pickle_is_read_unasked_and_then_tensors_alone(tmp_path):
    folder = nanochat(tmp_path / "a", plain_model())
    with pytest.raises(UserError, match="is a pickle, which can run code: add --allow-pickle"):
        read_foreign(folder)
    bad = nanochat(tmp_path / "b", plain_model(), lambda weights: {**weights, "x": _Evil()})
    with pytest.raises(UserError, match="holds more than tensors, or is damaged") as caught:
        read_foreign(bad, allow_pickle=True)
    assert "\n" not in str(caught.value) and not os.path.exists("/tmp/cognica-poe-was-here")
    folder = released(tmp_path / "c", release_model())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors file; pytorch_model\.bin is a pickle"):
        read_foreign(folder)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w: {n: t for n, t in w.items() if "c_q" not in n}, r"\d missing: transformer\.h\.0\.attn\.c_q\.weight"),
        (lambda w: {**w, "lm_head_extra.weight": torch.zeros(2)}, r"1 unexpected: lm_head_extra\.weight"),
        (lambda w: {n: t for n, t in w.items() if n != "smear_lambda"}, "1 missing: smear_lambda"),
        (lambda w: {**w, "lm_head.weight": w["lm_head.weight"][:-1].clone()}, "lm_head.weight has shape"),
        (lambda w: {**w, "resid_lambdas": w["resid_lambdas"] * float("nan")}, "resid_lambdas is not finite"),
        (lambda w: {**w, "module.lm_head.weight": w["lm_head.weight"].clone()}, "two tensors are lm_head.weight"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, change, said):
    with pytest.raises(UserError, match=said) as caught:
        fit(read_foreign(released(tmp_path / "m", release_model(), "", change)))
    assert "\n" not in str(caught.value)


def test_tables_of_the_rotation_are_passed_over():
    names = {"cos": torch.zeros(1), "transformer.rotary.sin": torch.zeros(1), "h.0.mlp.c_fc.weight": torch.zeros(1)}
    assert list(mapped(names, "x")) == ["transformer.h.0.mlp.c_fc.weight"]


def test_an_import_is_a_release(tmp_path, tokenizer_dir):
    model = release_model(5)
    folder = released(tmp_path / "step-700", model)
    texts = write_texts(tmp_path / "texts")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=re.escape("pass --tokenizer")):
        import_checkpoint(folder, out, str(texts))
    assert not out.exists()
    import_checkpoint(folder, out, str(texts), tokenizer=tokenizer_dir, measured_bytes=4000)
    found, tokenizer = load_release(out)
    assert tokenizer.vocab_size <= VOCAB
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())
    about = json.loads((out / "release.json").read_text())
    assert about["step"] == 700 and about["name"] == "step-700"
    assert list(about["imported_from"]["files"]) == ["model.safetensors"]
