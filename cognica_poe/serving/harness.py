"""Tasks of lm-evaluation-harness by one path of a release; the harness is an extra and imported when it is asked for.

The harness's own wrapper of transformers models would feed later windows of a text without BOS, cut it off where a
context is too long, and answer by the full pool alone. Here every row begins with BOS, once
(``analysis.continuations``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cognica_poe.analysis.continuations import Path as UsedPath
from cognica_poe.analysis.continuations import Scorer
from cognica_poe.errors import UserError
from cognica_poe.files import disk_errors, require_replaceable
from cognica_poe.seals import read_sealed, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

NEW_TOKENS = 256
"""Tokens of an answer where a task does not say."""
_REMEDY = "delete the file: evaluate again"


def require_harness() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            f"eval needs lm-evaluation-harness ({error}): install it with `pip install 'cognica-poe[eval]'`"
        ) from error
    return lm_eval


def evaluate(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    text_tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    path: UsedPath,
    *,
    shots: int | None = None,
    limit: int | None = None,
    task_folder: Path | None = None,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """What the harness measures: per task its metrics with standard errors, version, shots and number of samples.

    ``limit``: first so many samples of every task. ``task_folder``: YAML files of tasks of the user's own. Raises
    UserError for a missing harness, a task that it does not know, a path that the model does not have.
    """
    scorer = Scorer(model, tokenizer.bos_id, path)
    lm_eval = require_harness()
    manager = lm_eval.tasks.TaskManager(include_path=str(task_folder) if task_folder else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"task {unknown[0]!r} is none of lm-evaluation-harness {lm_eval.__version__}: see its list of tasks"
        )
    log(f"evaluating {', '.join(tasks)} by path {path}")
    found = lm_eval.simple_evaluate(
        model=_adapter(scorer, tokenizer, text_tokenizer),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {
        "path": str(path),
        "harness": lm_eval.__version__,
        "limit": limit,
        "seed": seed,
        "tasks": {
            task: {
                "metrics": {name: value for name, value in metrics.items() if _is_number(value)},
                "version": found["versions"].get(task),
                "shots": (found.get("n-shot") or {}).get(task),
                "samples": ((found.get("n-samples") or {}).get(task) or {}).get("effective"),
            }
            for task, metrics in sorted(found["results"].items())
        },
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _adapter(scorer: Scorer, tokenizer: Tokenizer, text_tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model as the harness sees it."""
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc]  # a class of a package without types
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [_pair(tokenizer, *request.args) for request in requests]
            return [(item.logprob, item.greedy) for item in scorer.continuations(pairs)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return scorer.rolling([tokenizer.encode(request.args[0]) for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_answer(scorer, tokenizer, text_tokenizer, *request.args) for request in requests]

    return Adapter()


def _pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, as the harness parts them: spaces at the end of the context begin the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    return before, whole[len(before) :]


@torch.no_grad()
def _answer(
    scorer: Scorer, tokenizer: Tokenizer, text_tokenizer: PreTrainedTokenizerBase, context: str, asked: dict[str, Any]
) -> str:
    """Greedy text behind ``context`` up to the first of the strings that end it. Raises UserError for a draw."""
    if asked.get("do_sample") or float(asked.get("temperature") or 0.0) > 0.0:
        raise UserError("a task asks for sampled answers; eval decodes greedily: set do_sample to false in the task")
    until = asked.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    length = min(int(asked.get("max_gen_toks") or NEW_TOKENS), scorer.window // 2)
    ids = [scorer.bos, *tokenizer.encode(context)[-(scorer.window - length - 1) :]]
    model, prompt = scorer.model, torch.tensor([ids], device=scorer.model.device)
    options: dict[str, Any] = {"max_new_tokens": length}
    if until:
        options |= {"stop_strings": until, "tokenizer": text_tokenizer}
    if model.config.poe_mode == "none":
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)
    elif scorer.path.kind == "stage":
        out = model.generate_stage(prompt, scorer.path.count or 0, **options)
    else:
        out = model.generate_prefix(prompt, scorer.path.count, **options)
    text = tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)
    return text[: min((text.find(end) for end in until if end and end in text), default=len(text))]


def require_place(file: Path, weights_sha256: str | None) -> None:
    """Raise UserError where ``store`` could not write: something else lies there, or results of other weights."""
    if os.path.lexists(file):
        known = read_sealed(file, "evaluation", _REMEDY)
        if "evaluations" not in known or known.get("weights_sha256") != weights_sha256:
            raise UserError(f"{file} is no evaluation of these weights: choose another --out, or remove it yourself")
    else:
        require_replaceable(file, "evaluation")


def require_tasks(folder: Path) -> None:
    """Raise UserError for a folder without a task."""
    with disk_errors(folder):
        if not folder.is_dir() or not any(folder.glob("*.yaml")):
            raise UserError(f"--task-folder {folder} holds no task: it needs a NAME.yaml for each")


def store(file: Path, of: dict[str, Any], found: dict[str, Any]) -> None:
    """Add what was evaluated to ``file``, a sealed file of one set of weights; the same path and task is replaced.

    ``of``: ``name``, ``step`` and ``weights_sha256`` of the record that it joins. Raises as ``require_place``.
    """
    require_place(file, of["weights_sha256"])
    known = read_sealed(file, "evaluation", _REMEDY) if file.is_file() else {"evaluations": []}
    kept = [item for item in known["evaluations"] if (item["path"], item["task"]) not in _keys(found)]
    new = [
        {"task": task, **result, **{key: found[key] for key in ("path", "harness", "limit", "seed")}}
        for task, result in found["tasks"].items()
    ]
    everything = sorted([*kept, *new], key=lambda item: (item["task"], item["path"]))
    write_sealed(file, {**of, "evaluations": everything})


def _keys(found: dict[str, Any]) -> set[tuple[str, str]]:
    return {(found["path"], task) for task in found["tasks"]}
