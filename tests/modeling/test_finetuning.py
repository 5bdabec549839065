"""Fine-tuning with transformers' and peft's tools: what labels teach, checkpointing, another vocabulary, adapters."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.training.objective import Objective
from tests.conftest import make_model

IDS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(0))


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(actual, expected, atol=1e-10):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=atol, rtol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(("taught", "mode"), [("flat", "flat"), ("stages", "hier")])
def test_labels_teach_stages_as_pretraining_does(taught, mode):
    """The mean of the stages' losses, with or without gradients across stages, as the trainer's own objectives."""
    model = make_model(poe_mode=mode, finetune_objective=taught).train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    found = gradients(model)
    losses = Objective(model).backward(IDS[:, :-1], IDS[:, 1:])
    torch.testing.assert_close(loss.double(), losses.mean(), atol=1e-6, rtol=0)
    assert_same(found, gradients(model), 1e-7)  # the model's logits are fp32, the trainer's are not


def test_labels_teach_the_pool_unless_told_otherwise():
    model = make_model().train()
    found = model(IDS, labels=IDS)
    expected = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten())
    torch.testing.assert_close(found.loss.double(), expected, atol=1e-5, rtol=0)
    found.loss.backward()
    deep = gradients(model)
    assert deep["transformer.h.0.attn.c_q.weight"].abs().sum() > 0
    with pytest.raises(ValueError, match="finetune_objective is 'all'; choose one of pool, stages, flat"):
        make_model(finetune_objective="all")


@pytest.mark.parametrize("taught", ["pool", "flat"])
def test_gradient_checkpointing_runs_layers_again_and_changes_nothing(taught):
    model = make_model(finetune_objective=taught).train()
    calls = []
    run = model.transformer.h[1].mlp.forward
    model.transformer.h[1].mlp.forward = lambda *a: (calls.append(1), run(*a))[1]
    model(IDS, labels=IDS).loss.backward()
    expected, once = gradients(model), len(calls)
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    assert (once, len(calls)) == (1, 3)
    assert_same(gradients(model), expected)
    model.eval()
    model(IDS)
    assert len(calls) == 4


@pytest.mark.parametrize("changes", [{}, {"stage_head_rank": 4}, {"per_stage_head": False}, {"poe_exit_layers": [1]}])
@pytest.mark.parametrize("size", [60, 97, 130])
def test_another_vocabulary_reaches_every_table_and_head(changes, size, tmp_path):
    model = make_model(**changes)
    kept = min(size, 97)
    ids = IDS % kept
    before = [logits[..., :kept] for logits in (*model.all_logits(ids)[0], model.all_logits(ids)[1])]
    table = model.resize_token_embeddings(size)
    assert len(table.weight) == model.config.vocab_size == size and table is model.get_input_embeddings()
    after = [*model.all_logits(ids)[0], model.all_logits(ids)[1]]
    for old, new in zip(before, after, strict=True):
        assert new.shape[-1] == size
        torch.testing.assert_close(new[..., :kept], old)
    model.save_pretrained(tmp_path)
    loaded = CognicaPoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    out = model.generate_prefix(ids[:, :4], max_new_tokens=6)
    assert out.max() < size


def test_new_rows_are_means_and_sizes_are_rounded():
    model = make_model()
    expected = model.value_embeds["0"].weight.float().mean(dim=0)
    model.resize_token_embeddings(100, pad_to_multiple_of=64)
    assert model.config.vocab_size == 128
    torch.testing.assert_close(model.value_embeds["0"].weight[127].float(), expected)
    model.resize_token_embeddings(130, mean_resizing=False)
    assert not model.lm_head.weight[129].any()
    with pytest.raises(ValueError, match="at least one token"):
        model.resize_token_embeddings(0)


def test_the_trainer_trains_evaluates_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def run(steps, resume=None):
        torch.manual_seed(0)
        model = make_model(dtype=torch.float32, finetune_objective="stages")
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=4, per_device_train_batch_size=3, learning_rate=1e-3,
            gradient_checkpointing=True, report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
        before = trainer.evaluate()["eval_loss"]
        trainer.train(resume_from_checkpoint=resume)
        return before, trainer.evaluate()["eval_loss"], model.state_dict()

    before, after, whole = run(8)
    assert after < before - 0.01
    _, _, resumed = run(8, str(tmp_path / "run" / "checkpoint-4"))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, msg=name)


def test_adapters_on_all_linear_parts_train_merge_and_load(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = make_model(dtype=torch.float32, finetune_objective="stages")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.eval().merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = CognicaPoEForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(IDS).logits, merged(IDS).logits)
    again = peft.PeftModel.from_pretrained(make_model(dtype=torch.float32), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, merged(IDS).logits, atol=1e-4, rtol=1e-4)
    text = loaded.generate(IDS[:1, :5], poe_mode="full", max_new_tokens=8)
    assert torch.equal(text, merged.generate_prefix(IDS[:1, :5], max_new_tokens=8))
