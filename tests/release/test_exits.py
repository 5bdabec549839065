"""An exit added to a release: only its head is new, it drafts better than chance, and the release is whole."""

import dataclasses
import json

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.cli.main import main
from cognica_poe.errors import UserError
from cognica_poe.recipe.stored import save_recipe
from cognica_poe.release.exits import add_exit
from cognica_poe.release.export import check_release, load_release
from cognica_poe.training.exits import ExitRecipe
from tests.runs import small_recipe, write_texts

RECIPE = ExitRecipe(layer=1, tokens=20_000, batch_rows=4, lr=0.05, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with texts, a run and its release, and the release with an exit."""
    base = tmp_path_factory.mktemp("exits")
    recipe = small_recipe(write_texts(base / "texts"), steps=60)
    recipe = dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, every=60, log_steps=False))
    save_recipe(recipe, base / "recipe.json")
    pipeline.run_recipe(recipe, base / "run", resume=False, log=lambda line: None, progress=lambda step, metrics: None)
    steps = []
    source, out = base / "run" / "release" / "step-60", base / "out"
    added = add_exit(source, out, str(base / "texts"), RECIPE, progress=lambda step, metrics: steps.append(metrics))
    return base, source, out, added, steps


def test_only_the_head_is_new(made):
    _, source, out, added, steps = made
    before, after = (load_release(path)[0].state_dict() for path in (source, out))
    assert after.keys() - before.keys() == {"lm_head_exits.0.weight"} and after["lm_head_exits.0.weight"].any()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    assert len(steps) == added.steps == 20_000 // (4 * 64)
    assert steps[-1]["loss_stages"][0] < steps[0]["loss_stages"][0] - 0.3


def test_the_release_is_whole_and_says_what_was_measured(made):
    _, source, out, added, _ = made
    old, new = check_release(source), check_release(out)
    assert (new.config["poe_exit_layers"], new.config["exit_head_rank"]) == ([1], 0)
    assert new.config["poe_wand_p99_bounds_per_exit"] == [added.measure.bound] and added.measure.bound > 0
    assert new.about["exits"] == [added.as_dict()] and "exits" not in old.about
    assert {**new.record, "model": None} == {**old.record, "model": None}
    assert new.record["model"]["parameters"] == old.record["model"]["parameters"] + 400 * 32
    card = (out / "README.md").read_text()
    assert "## Exits" in card and f"{100 * added.measure.agreement:.1f}" in card
    assert "## Exits" not in (source / "README.md").read_text()


def test_what_was_measured(made):
    """Agreement and loss from the model's own logits on one held-out text, and drafts that leave text as it was."""
    from cognica_poe.analysis.exits import measure_exits
    from cognica_poe.data.tokenizer import load_tokenizer

    base, _, out, added, _ = made
    model, tokenizer = load_release(out)[0], load_tokenizer(out)
    text = (base / "texts" / "ast.txt").read_text()[:400]
    (measure,) = measure_exits(model, tokenizer, [text])
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
    scores, pool, first = [], [], []
    for start in range(0, ids.shape[1] - 1, 64):  # windows of the context, each behind BOS
        window = ids[:, start + 1 : start + 65]
        inputs = torch.cat((ids[:, :1], window[:, :-1]), dim=1)
        scores.append(model.forward_exit(inputs, 1)[0].log_softmax(-1))
        pool.append(model.forward_aggregated(inputs)[0])
        first.append(model.forward_aggregated(inputs, 1)[0])
    scores, pool, targets = torch.cat(scores), torch.cat(pool), ids[0, 1:]
    assert measure.positions == len(targets)
    assert measure.agreement == pytest.approx((scores.argmax(-1) == pool.argmax(-1)).double().mean().item())
    assert measure.nats == pytest.approx(torch.nn.functional.nll_loss(scores, targets).item(), rel=1e-5)
    change = torch.cat(first) - scores
    ranges = (change.amax(dim=-1) - change.amin(dim=-1)).double()
    assert measure.bound == pytest.approx(ranges.quantile(0.99).item(), rel=1e-5)
    assert added.measure.agreement > 0.1 and added.speculative.acceptance > 0.1
    prompt = ids[:, :16]
    drafted, drafts = model.generate_speculative(prompt, draft_layer=1, max_new_tokens=20, return_acceptance=True)
    assert torch.equal(drafted, model.generate(prompt, poe_mode="full", max_new_tokens=20, eos_token_id=None))
    assert drafts["proposed"] and added.speculative.proposed


def test_the_same_seed_gives_the_same_bytes(made, tmp_path):
    base, source, out, _, _ = made
    add_exit(source, tmp_path / "again", str(base / "texts"), RECIPE)
    assert (tmp_path / "again" / "MANIFEST.sha256").read_bytes() == (out / "MANIFEST.sha256").read_bytes()


def test_the_command(made, tmp_path, capsys):
    base, source, _, _, _ = made
    words = ["add-exit", source, "--layer", 1, "--out", tmp_path / "thin", "--text", base / "texts", "--tokens", 600]
    main([*map(str, words), "--rank", "4", "--batch-rows", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["layer"], found["rank"], found["steps"]) == (1, 4, 4)
    names = load_release(tmp_path / "thin")[0].state_dict().keys()
    assert {"lm_head_exits.0.up.weight", "lm_head_exits.0.down.weight"} <= names


def test_what_cannot_be_is_refused_before_any_work(made, tmp_path):
    base, source, out, _, _ = made
    texts, new = str(base / "texts"), tmp_path / "new"
    for path, to, recipe, message in (
        (source, new, ExitRecipe(2), "a stage ends behind layer"),
        (source, new, ExitRecipe(3), "must ascend from at least 1 to below num_hidden_layers = 3"),
        (source, new, ExitRecipe(1, rank=32), "exit_head_rank 32"),
        (out, new, ExitRecipe(1), "has an exit there already"),
        (source, base / "texts", ExitRecipe(1), "is not a release folder made by cognica-poe"),
        (source, source, ExitRecipe(1), "is what is read"),
        (tmp_path, new, ExitRecipe(1), "MANIFEST"),
    ):
        with pytest.raises(UserError, match=message):
            add_exit(path, to, texts, recipe)
    assert not new.exists()
