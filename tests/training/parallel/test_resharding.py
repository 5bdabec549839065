"""The trainer on several ranks: same weights, exact resume on as many ranks, near resume on any other number."""

import contextlib
import json
import os
import shutil
import signal

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.errors import TrainingStopped, UserError
from cognica_poe.recipe.fields import RanksRecipe
from cognica_poe.recipe.stored import save_recipe
from cognica_poe.training import replica as replica_module
from cognica_poe.training.build import build_model
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.trainer import Trainer
from tests.gloo import run_ranks
from tests.runs import small_recipe, with_training, write_texts

STEPS = 8
FP32 = {"compute_dtype": "float32"}
WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder with data, tokenizer and rows, and no training yet."""
    folder = tmp_path_factory.mktemp("prepared")
    recipe = small_recipe(
        write_texts(folder / "texts"), steps=STEPS, batch_rows=12, micro_rows=1, checkpoint_every=4, **FP32
    )
    pipeline.prepare(recipe, folder / "run", lambda line: None)
    pipeline.open_rows(folder / "run", recipe).facts(0)
    return folder / "run"


@pytest.fixture
def fresh(prepared, tmp_path):
    def make(name):
        shutil.copytree(prepared, tmp_path / name)
        return tmp_path / name

    return make


def train(ranks, run, options=None, resume=False, until=None, dtype=torch.float32, beside=False, **training):
    """Train a run folder; returns the weights of rank 0's replicas after every step of this call.

    ``until`` sends SIGTERM to one rank after that step; ``beside`` saves while training goes on.
    """
    recipe = pipeline.read_recipe(run)
    recipe = with_training(recipe, **training, ranks=options or recipe.training.ranks)
    history = {}
    replica_module.build_model = lambda *args: build_model(*args).to(dtype)

    def step_hook(step, metrics):
        if step == until:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), resume=resume, progress=step_hook, ranks=ranks)
    trainer.start()
    if beside:  # save as on an accelerator
        trainer.background = ranks.in_background()
    one_step = trainer._train_step

    def recorded():
        metrics = one_step()
        history[trainer.step] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        return metrics

    trainer._train_step = recorded
    with contextlib.suppress(TrainingStopped):
        trainer.train()
    return history


def checkpoint(run, step=STEPS):
    found = CheckpointFolder(run / "checkpoints").load(step)
    return {**found.weights, **found.optimizer}


def assert_bit_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def error(actual, expected):
    """Largest relative deviation over parameters, by norm."""
    return max(((actual[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


@pytest.fixture(scope="module")
def plain(prepared, tmp_path_factory):
    """Weights of one plain process without a process group, in fp64, after every step."""
    run = tmp_path_factory.mktemp("plain") / "run"
    shutil.copytree(prepared, run)
    return run_ranks(1, train_alone, run)[0]


def train_alone(ranks, run, dtype=torch.float64, compute_dtype="float32"):
    return train(Ranks(), run, dtype=dtype, compute_dtype=compute_dtype)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_same_run_as_one_process(world, fresh, plain):
    """In fp64 with fp32 Newton-Schulz. At the start of training gradients of the lambdas are sums that cancel to 1e-11;
    Adam makes full steps of whatever fp32 leaves of them, so that in fp32 any regrouping of a sum changes a run."""
    run = fresh("run")
    histories = run_ranks(world, train, run, None, False, None, torch.float64)
    for step in range(1, STEPS + 1):
        for other in histories[1:]:
            assert_bit_equal(other[step], histories[0][step])
        assert error(histories[0][step], plain[step]) <= 2e-6
    joined = CheckpointFolder(run / "checkpoints").load(STEPS).weights
    assert_bit_equal(joined, histories[0][STEPS])


def test_one_reduction_per_step_gives_the_same_run(fresh, plain):
    once = RanksRecipe(grad_sync="last_microbatch")
    history = run_ranks(2, train, fresh("run"), once, False, None, torch.float64)[0]
    assert error(history[STEPS], plain[STEPS]) <= 2e-6


@pytest.mark.parametrize("mode", ["hier", "none"])
def test_one_backward_pass_for_all_stages(mode, tmp_path):
    recipe = small_recipe(write_texts(tmp_path / "texts"), mode, steps=3, batch_rows=4, micro_rows=1, **FP32)
    pipeline.prepare(recipe, tmp_path / "one", lambda line: None)
    pipeline.open_rows(tmp_path / "one", recipe).facts(0)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one = run_ranks(1, train_alone, tmp_path / "one")[0]
    two = run_ranks(2, train, tmp_path / "two", None, False, None, torch.float64)[0]
    assert error(two[3], one[3]) <= 2e-6


def resumed(fresh, first, second, dtype):
    """A run on ``first`` ranks, stopped after step 3 and resumed twice on ``second``; its last weights."""
    run = fresh("run")
    for world, resume, until in ((first, False, 3), (second, True, 6), (second, True, None)):
        history = run_ranks(world, train, run, None, resume, until, dtype)[0]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = [(e["event"], e["step"], e.get("ranks")) for e in events]
    starts = [("start", 0, first), ("resume", 3, second), ("resume", 6, second)]
    assert kinds == [starts[0], ("stopped", 3, None), starts[1], ("stopped", 6, None), starts[2], ("end", STEPS, None)]
    return history[STEPS], run


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_resume_on_as_many_ranks_is_exact(world, fresh):
    whole = fresh("whole")
    run_ranks(world, train, whole)
    _, run = resumed(fresh, world, world, torch.float32)
    assert_bit_equal(checkpoint(run), checkpoint(whole))


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 2)])
def test_resume_on_other_ranks(first, second, fresh, plain):
    weights, _ = resumed(fresh, first, second, torch.float64)
    assert error(weights, plain[STEPS]) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("first", WORLDS)
@pytest.mark.parametrize("second", WORLDS)
def test_any_number_of_ranks_resumes_any_other(first, second, fresh, plain):
    weights, _ = resumed(fresh, first, second, torch.float64)
    assert error(weights, plain[STEPS]) <= 1e-6


@pytest.mark.parametrize("world", [1, 2])
def test_saving_beside_the_training_changes_nothing(world, fresh):
    """Training goes on and changes the tensors while a step is being written."""
    here, beside = fresh("here"), fresh("beside")
    run_ranks(world, train_with, here, {"checkpoint_every": 1})
    run_ranks(world, train_with, beside, {"checkpoint_every": 1, "beside": True})
    steps = CheckpointFolder(here / "checkpoints").steps()
    assert CheckpointFolder(beside / "checkpoints").steps()[-3:] == steps and steps[-1] == STEPS
    for step in steps:
        assert_bit_equal(checkpoint(beside, step), checkpoint(here, step))


def fill_the_disk(ranks, run):
    """Space ends at step 4; the error of that save arrives with the next one."""
    recipe = pipeline.read_recipe(run)
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), ranks=ranks)
    trainer.start()
    trainer.background = ranks.in_background()
    write = trainer.checkpoints._write

    def full(partial, part, tensors):
        if "step-4" in partial.name and ranks.rank == 1:
            raise UserError(f"no space left while writing {partial}")
        return write(partial, part, tensors)

    trainer.checkpoints._write = full
    try:
        trainer.train()
    except UserError as error:
        return trainer.step, str(error)


def test_a_failed_save_beside_the_training_stops_all_ranks(fresh):
    run = fresh("run")
    recipe = pipeline.read_recipe(run)
    save_recipe(with_training(recipe, checkpoint_every=2), run / "recipe.json")
    for step, error in run_ranks(2, fill_the_disk, run):
        assert step == 6 and "no space left" in error
    assert CheckpointFolder(run / "checkpoints").steps() == [2]


def losses(run):
    return torch.tensor([json.loads(line)["loss_stages"] for line in (run / "metrics.jsonl").read_text().splitlines()])


@pytest.mark.slow  # emulated bf16
def test_bf16_replicas_train_like_autocast_and_resume_exactly(fresh):
    """Ranks compute with bf16 weights where one process casts fp32 ones; checkpoints hold the fp32 masters."""
    one, two = fresh("one"), fresh("two")
    run_ranks(1, train_alone, one, torch.float32, "bfloat16")
    options = {"compute_dtype": "bfloat16"}
    history = run_ranks(2, train_with, two, options)[0]
    assert (
        history[STEPS]["lm_head.weight"].dtype == torch.bfloat16 and history[STEPS]["x0_lambdas"].dtype == torch.float32
    )
    assert all(value.dtype == torch.float32 for value in checkpoint(two).values())
    torch.testing.assert_close(losses(two), losses(one), rtol=0.02, atol=0)
    resumed = fresh("resumed")
    for until, resume in ((3, False), (None, True)):
        run_ranks(2, train_with, resumed, {**options, "until": until, "resume": resume})
    assert_bit_equal(checkpoint(resumed), checkpoint(two))


def train_with(ranks, run, options):
    return train(ranks, run, **options)


def test_ranks_must_share_the_rows_evenly(fresh):
    with pytest.raises(AssertionError, match=r"batch-rows 12 cannot be shared by 2 ranks in micro-batches of 12 rows"):
        run_ranks(2, train_with_micro_rows, fresh("run"), 12)


def train_with_micro_rows(ranks, run, micro_rows):
    train(ranks, run, micro_rows=micro_rows)
