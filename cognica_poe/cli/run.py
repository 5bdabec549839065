"""The commands that train: ``run`` for the whole life of a model, ``train`` alone on any number of ranks."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import tyro

from cognica_poe.cli.output import as_dicts, print_json, print_records, print_samples
from cognica_poe.cli.progress import TrainingProgress, log
from cognica_poe.errors import UserError
from cognica_poe.files import safe_name
from cognica_poe.recipe.fields import Recipe
from cognica_poe.recipe.rules import check
from cognica_poe.serving.generation import GenerationOptions, generate, load_model
from cognica_poe.training.parallel.ranks import join_ranks

Flattened = Annotated[Recipe, tyro.conf.arg(name="")]
SAMPLE_PROMPT = "Return a list of the"


@dataclasses.dataclass(frozen=True)
class RunArguments:
    """Train a recipe and release it. Every field of the recipe is an option."""

    recipe: Flattened
    out: Path
    """Run folder."""
    resume: bool = False
    """Go on with an interrupted run."""
    json: bool = False
    """Print one JSON document instead of tables."""

    @classmethod
    def of(cls, recipe: Recipe) -> RunArguments:
        """Arguments of a recipe in ``runs/NAME``. Raises UserError for a name that no folder can have."""
        return cls(recipe, Path("runs") / safe_name(recipe.name, "recipe name"))


def run(arguments: RunArguments) -> None:
    """Whole life of a model: data, tokenizer, training, a measured release per step, report, sample text."""
    from cognica_poe import pipeline

    recipe, out = check(arguments.recipe), arguments.out
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("run is for one process: under torchrun use `train`, then `analyze`, `export` and `publish`")
    with TrainingProgress(recipe.training.steps) as progress:
        steps = pipeline.run_recipe(recipe, out, resume=arguments.resume, log=log, progress=progress)
    model, tokenizer = load_model(str(out / "release" / f"step-{steps[-1]}"))
    modes = ("full", "prefix", "wand", "speculative") if recipe.model.poe_mode != "none" else ("full",)
    length = min(64, recipe.model.max_position_embeddings // 2)
    samples = [
        generate(model, tokenizer, SAMPLE_PROMPT, GenerationOptions(mode=mode, max_new_tokens=length))  # type: ignore
        for mode in modes
    ]
    records = pipeline.load_records(out / "analysis")
    if arguments.json:
        record = records[-1].model_dump(mode="json")
        return print_json({"run": str(out), "steps": steps, "record": record, "samples": as_dicts(samples)})
    print_records(records)
    print_samples(samples)
    print(f"\nrun folder        {out}")
    print(f"report            {out / 'report' / 'index.html'}")
    print(f"records           {out / 'analysis'}/step-N.json for N in {', '.join(map(str, steps))}")
    print(f"releases          {out / 'release'}/step-N")
    hub = out / "release" / "hub"
    print(f'local Hub cache   AutoModelForCausalLM.from_pretrained("{recipe.release.repo_id}",')
    print(f'                      revision="step-{steps[-1]}", cache_dir="{hub}",')
    print("                      local_files_only=True, trust_remote_code=True)")


@dataclasses.dataclass(frozen=True)
class TrainArguments(RunArguments):
    """Train a recipe. Every field of the recipe is an option."""


def train(arguments: TrainArguments) -> None:
    """Train only, on one process or, under torchrun, on many; checkpoints land in OUT/checkpoints."""
    from cognica_poe import pipeline
    from cognica_poe.training.trainer import Trainer

    recipe, out = check(arguments.recipe), arguments.out
    with join_ranks() as ranks:
        resume = arguments.resume or ranks.restarts > 0
        ranks.on_first(lambda: pipeline.prepare(recipe, out, log, resume))
        rows = pipeline.open_rows(out, recipe, log if ranks.is_first else lambda line: None)
        with TrainingProgress(recipe.training.steps) as progress:
            trainer = Trainer(recipe, out, rows, resume=resume, log=log, progress=progress, ranks=ranks)
            trainer.train()
        if not ranks.is_first:
            return
    steps = pipeline.checkpoint_steps(out, ())
    if arguments.json:
        return print_json({"run": str(out), "checkpoints": steps})
    print(f"trained {recipe.name} to step {trainer.step}; checkpoints of steps {', '.join(map(str, steps))}")
    print(f"next: cognica-poe analyze {out}")
