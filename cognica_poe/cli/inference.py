"""The commands that use a release: ``generate`` and ``serve``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from cognica_poe.cli.arguments import Checkpoint, Flag, Prompt, ReleaseFolder
from cognica_poe.cli.output import print_json, summary
from cognica_poe.cli.progress import log
from cognica_poe.data.documents import text_problem
from cognica_poe.errors import UserError
from cognica_poe.serving.options import GenerationOptions, ServerOptions


def generate(
    checkpoint: Checkpoint,
    prompt: Prompt,
    options: Annotated[GenerationOptions, tyro.conf.arg(name="")] = GenerationOptions(),  # noqa: B008
    revision: str | None = None,
    cache_dir: Path | None = None,
    json: Flag = False,
) -> None:
    """Continue a prompt; streams the text, then prints tokens/s, stages used and acceptance.

    Args:
        checkpoint: Release folder, or org/name with --cache-dir.
        prompt: Text to continue.
        options: How to generate.
        revision: Revision within the Hub cache folder, such as step-300; main when omitted.
        cache_dir: Local Hub cache folder.
        json: Print one JSON document instead of streaming.
    """
    from transformers import TextStreamer

    from cognica_poe.release.loading import load
    from cognica_poe.serving.generation import generate as generate_text

    if text_problem(prompt) == "not utf-8":
        raise UserError("generate: the prompt is not UTF-8 text; convert it")

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt:  # not before it is clear that the prompt can be answered
                print(prompt, end="", flush=True)
            super().put(value)

    model, tokenizer = load(checkpoint, revision, cache_dir)
    streamer = None if json else Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = generate_text(model, tokenizer, prompt, options, streamer)
    if json:
        return print_json(dataclasses.asdict(result))
    log(summary(result))


def serve(
    checkpoint: ReleaseFolder,
    options: Annotated[ServerOptions, tyro.conf.arg(name="")] = ServerOptions(),  # noqa: B008
) -> None:
    """Serve a release folder over HTTP as OpenAI's API: completions, chat where the release has a template, models.

    Clients name the model by its folder's name. /health and /metrics (Prometheus) stand beside /v1. Answers of modes
    full, prefix, stage and exit decode together, those of wand and speculative one by one.

    Args:
        checkpoint: Release folder.
        options: Where to listen, and how the model answers.
    """
    from cognica_poe.serving import server

    server.serve(checkpoint, options, log)
