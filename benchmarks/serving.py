"""``python -m benchmarks.serving RELEASE``: clients of our server and of transformers', over the same release in turn.

Each server runs in a process of its own on ``--threads`` threads; 1, 4 and 16 clients ask for ``--new-tokens`` tokens
behind prompts of 24 words. Tokens per second of all clients together and the median time to the first token are shown,
as medians of ``--rounds`` rounds in which both servers take turns. transformers serves no model with code of its own:
its server is started with ours registered among its classes.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tyro

from cognica_poe.cli.output import print_table
from cognica_poe.errors import UserError

TEXT = "the city of a small river house under old light and many people went over to see what was there"
REGISTERED = """
import sys, transformers
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
transformers.AutoConfig.register(CognicaPoEConfig.model_type, CognicaPoEConfig, exist_ok=True)
setattr(transformers, "CognicaPoEForCausalLM", CognicaPoEForCausalLM)
from transformers.cli.serve import Serve
Serve(force_model=sys.argv[1], host="127.0.0.1", port=int(sys.argv[2]), device="cpu", dtype=sys.argv[3])
"""


@contextmanager
def server(command: list[str], threads: int) -> Iterator[int]:
    """Port of a server, run as a process; ``PORT`` in the command stands for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.replace("PORT", str(port)) for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            time.sleep(0.2)
            if process.poll() is not None:
                last = (process.stderr.read() if process.stderr else "").strip().splitlines()[-1:]
                raise UserError(f"the server ended: {' '.join(last)}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                continue
        yield port
    finally:
        process.terminate()
        process.wait(60)


def ask(port: int, model: str, number: int, new_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the end of one streamed answer, and pieces of text that came."""
    words = TEXT.split()
    prompt = " ".join(words[(number * 7 + place) % len(words)] for place in range(24))
    body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began, first, pieces = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                first = first or time.perf_counter() - began
                pieces += 1
    return first, time.perf_counter() - began, pieces


def load(port: int, model: str, clients: int, new_tokens: int) -> tuple[float, float]:
    """Tokens per second of ``clients`` clients, two requests each, and the median seconds to a first token."""
    requests = range(2 * clients)
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda number: ask(port, model, number, new_tokens), requests))
    took = time.perf_counter() - began
    return len(requests) * new_tokens / took, statistics.median(first for first, _, _ in found)


def compare(
    release: tyro.conf.Positional[Path],
    clients: tuple[int, ...] = (1, 4, 16),
    new_tokens: int = 64,
    rounds: int = 3,
    threads: int = 2,
    dtype: str = "bfloat16",
) -> None:
    """Print the table.

    Args:
        release: A release folder, without end tokens in its greedy texts for the count to be right.
        clients: Numbers of clients at once.
        new_tokens: Tokens of an answer.
        rounds: Turns of each server.
        threads: Threads of each server.
        dtype: Of the weights.
    """
    folder = str(release.resolve())
    ours = [sys.executable, "-m", "cognica_poe.cli.main", "serve", folder, "--port", "PORT", "--dtype", dtype]
    theirs = [sys.executable, "-c", REGISTERED, folder, "PORT", dtype]
    names = {"cognica-poe": release.resolve().name, "transformers": folder}
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with server([*ours, "--host", "127.0.0.1", "--device", "cpu"], threads) as our, server(theirs, threads) as their:
        ports = {"cognica-poe": our, "transformers": their}
        for name, port in ports.items():
            load(port, names[name], 1, new_tokens)  # what is compiled or allocated once
        for _ in range(rounds):
            for count in clients:
                for name, port in ports.items():
                    found.setdefault((name, count), []).append(load(port, names[name], count, new_tokens))
    rows = []
    for (name, count), runs in found.items():
        speed, first = (statistics.median(run[part] for run in runs) for part in (0, 1))
        one = statistics.median(run[0] for run in found[name, clients[0]])
        rows.append([name, str(count), f"{speed:.0f}", f"{speed / one:.2f}x", f"{1000 * first:.0f}"])
    columns = ["server", "clients", "tokens/s", "of one client", "first token, ms"]
    print_table(f"answers of {new_tokens} tokens, {dtype}, {threads} threads", columns, rows)


if __name__ == "__main__":
    try:
        tyro.cli(compare)
    except UserError as error:
        print(f"benchmarks.serving: {error}", file=sys.stderr)
        sys.exit(2)
