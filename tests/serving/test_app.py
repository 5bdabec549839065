"""The server as OpenAI's own client meets it: fields, streams, log-probabilities, company, and mistakes."""

import concurrent.futures
import json
import resource
import socket
import time
import urllib.error
import urllib.request

import pytest
import torch

from tests.serving.conftest import running

openai = pytest.importorskip("openai")


def alone(answering, prompt, new=12, **options):
    """Text of the decoding mode itself, with the rows and capacity of a server."""
    ids = torch.tensor([answering.tokenizer(prompt, split_special_tokens=True)["input_ids"]])
    out = answering.model.generate_prefix(ids, max_new_tokens=new, **options)
    return answering.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_text_is_that_of_the_mode(client, served):
    for prompt in ("the cat", "a dog sat", ""):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        assert answer.choices[0].text == alone(served[1], prompt)
        assert answer.usage.completion_tokens == 12 and answer.choices[0].finish_reason == "length"
        assert answer.usage.poe["mode"] == "full"


def test_sampling_repeats_by_seed_and_choices_differ(client, served):
    options = {"model": "tiny", "prompt": "the", "max_tokens": 16, "temperature": 1.5, "seed": 7, "n": 3}
    first, second = (client.completions.create(**options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices] and len(set(texts)) == 3
    assert texts[0] == alone(served[1], "the", 16, do_sample=True, temperature=1.5, seed=7)
    other = client.completions.create(**{**options, "seed": 8, "n": 1})
    assert other.choices[0].text == texts[1]  # the second choice is that of the next seed
    narrow = client.completions.create(model="tiny", prompt="the", max_tokens=16, seed=7, top_p=1e-6)
    greedy = client.completions.create(model="tiny", prompt="the", max_tokens=16, temperature=0)
    assert narrow.choices[0].text == greedy.choices[0].text


def test_streams_say_the_same_and_end(client):
    options = {"model": "tiny", "prompt": ["the cat", "a log"], "max_tokens": 10, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**options)
    texts, ends, likely = ["", ""], [None, None], [[], []]
    usage = None
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            likely[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert likely == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert usage.completion_tokens == 20


def test_a_stream_closes_with_done(served):
    body = {"model": "tiny", "prompt": "the", "max_tokens": 2, "stream": True}
    status, text = post(served[0], "/v1/completions", body)
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert status == 200 and events[-1] == "[DONE]" and all(json.loads(event) for event in events[:-1])


def test_stop_strings_are_not_in_the_text(client):
    text = client.completions.create(model="tiny", prompt="the", max_tokens=30, temperature=0).choices[0].text
    for start in range(1, len(text) - 3):
        stop = text[start : start + 3]
        for stream in (False, True):
            answer = client.completions.create(
                model="tiny", prompt="the", max_tokens=30, temperature=0, stop=["\n\n\n\n", stop], stream=stream
            )
            chunks = list(answer) if stream else [answer]
            found = "".join(chunk.choices[0].text for chunk in chunks)
            assert found == text[: text.index(stop)], (stop, stream)
            assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_pool(client, served):
    _, answering = served
    answer = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=5, temperature=0, logprobs=3, echo=True
    )
    choice = answer.choices[0]
    ids = answering.tokenizer("the cat", split_special_tokens=True)["input_ids"]
    text = answering.model.generate_prefix(torch.tensor([ids]), max_new_tokens=5)
    with torch.no_grad():
        expected = answering.model.forward_aggregated(text)[0]
    wanted = [expected[place, token].item() for place, token in enumerate(text[0, 1:].tolist())]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    assert len(choice.logprobs.top_logprobs[-1]) == 3 and choice.text.startswith("the cat")
    offsets = choice.logprobs.text_offset
    assert offsets == sorted(offsets) and len(offsets) == len(choice.logprobs.tokens) == len(wanted) + 1
    plain = [pair for pair in zip(offsets, choice.logprobs.tokens, strict=True) if pair[1].isalnum()]
    assert plain and all(choice.text[offset:].startswith(token) for offset, token in plain)
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("fields", [{"presence_penalty": 2.0}, {"frequency_penalty": -2.0}, {"logit_bias": {"65": 3}}])
def test_penalties_and_biases_change_scores_as_documented(client, served, fields):
    """Against the definition, token by token: only what the answer holds is counted, not the prompt."""
    answering = served[1]
    ask = {"model": "tiny", "prompt": "the cat", "max_tokens": 24, "temperature": 0}
    answer = client.completions.create(**ask, **fields)
    ids = answering.tokenizer("the cat", split_special_tokens=True)["input_ids"]
    new: list[int] = []
    for _ in range(24):
        with torch.no_grad():
            scores = answering.model.forward_aggregated(torch.tensor([ids + new]))[0, -1]
        for token in set(new):
            scores[token] -= fields.get("presence_penalty", 0) + fields.get("frequency_penalty", 0) * new.count(token)
        for token, bias in fields.get("logit_bias", {}).items():
            scores[int(token)] += bias
        new.append(int(scores.argmax()))
    assert answer.choices[0].text == answering.tokenizer.decode(new, skip_special_tokens=True)
    assert answer.choices[0].text != client.completions.create(**ask).choices[0].text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_clients_get_the_texts_of_one(folder, dtype):
    prompts = [f"{word} {number}" for number, word in enumerate(["the cat", "a dog", "mat and", "log;"] * 5)]
    with running(folder, dtype=dtype) as (port, _):

        def ask(prompt):
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0}
            return json.loads(post(port, "/v1/completions", body)[1])["choices"][0]["text"]

        one_by_one = [ask(prompt) for prompt in prompts]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, prompts)) == one_by_one


@pytest.mark.parametrize(
    "options",
    [{"mode": "speculative", "drafter": "stage", "k_draft": 3}, {"mode": "wand"}, {"mode": "stage", "stage": 1}],
)
def test_other_modes(folder, options):
    with running(folder, **options) as (port, answering):
        ids = torch.tensor([answering.tokenizer("the cat")["input_ids"]])
        model = answering.model
        expected = {
            "speculative": lambda: model.generate_speculative(ids, max_new_tokens=12, k_draft=3),
            "wand": lambda: model.generate_wand(ids, max_new_tokens=12),
            "stage": lambda: model.generate_stage(ids, 1, max_new_tokens=12),
        }[options["mode"]]()
        text = answering.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        ask = {"model": "tiny", "prompt": "the cat", "max_tokens": 12, "temperature": 0}
        status, found = post(port, "/v1/completions", ask)
        answer = json.loads(found)
        assert status == 200 and answer["choices"][0]["text"] == text
        told = {"speculative": "accepted", "wand": "mean_stages_used", "stage": "mode"}[options["mode"]]
        assert told in answer["usage"]["poe"]
        if options["mode"] != "stage":
            status, found = post(port, "/v1/completions", {**ask, "logprobs": 1})
            assert status == 400 and "logprobs are not served" in found


# ---- mistakes --------------------------------------------------------------------------------------------------------


def post(port, path, body, headers=None, method="POST"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json", **(headers or {})}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


GOOD = {"model": "tiny", "prompt": "the", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
VALUES = (None, -1, 0, 1, 2**70, 1.5, -0.5, 1e308, True, "x", "", [], [""], [None], {}, {"a": 1})
FIELDS = (
    "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "logprobs", "echo", "best_of",
    "suffix", "presence_penalty", "frequency_penalty", "logit_bias", "stream", "stream_options", "user",
    "parse_special_tokens",
)  # fmt: skip


def test_odd_values_are_answered_or_refused_with_a_sentence(served):
    counts = {}
    for field in FIELDS:
        for value in VALUES:
            status, text = post(served[0], "/v1/completions", {**GOOD, field: value})
            assert status in (200, 400), (field, value, status, text)
            if status == 400:
                message = json.loads(text)["error"]["message"]
                assert message and "\n" not in message and "Traceback" not in message, (field, value, message)
            counts[status] = counts.get(status, 0) + 1
    print(f"{sum(counts.values())} tried: {counts}")
    assert sum(counts.values()) > 250 and min(counts.values()) > 50


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/v1/completions", b"{", 400, "no JSON"),
        ("/v1/completions", b"[]", 400, "dictionary"),
        ("/v1/completions", b"", 400, "required"),
        ("/v1/completions", {**GOOD, "model": "other"}, 404, "this server has 'tiny'"),
        ("/v1/completions", {**GOOD, "model": "\ud800"}, 404, "this server has 'tiny'"),
        ("/v1/completions", {**GOOD, "\ud800": 1}, 400, "valid string"),
        ("/v1/completions", {**GOOD, "beams": 4}, 400, "beams is not served"),
        ("/v1/completions", {**GOOD, "max_tokens": 10_000}, 400, "has room for"),
        ("/v1/completions", {**GOOD, "prompt": "x " * 5000}, 400, "shorten it"),
        ("/v1/completions", {**GOOD, "prompt": [1, 10_000]}, 400, "token 10000 does not exist"),
        ("/v1/completions", {**GOOD, "logit_bias": {"10000": 1}}, 400, "token 10000 does not exist"),
        ("/v1/completions", {**GOOD, "prompt": ["x"] * 65}, 400, "at most 64 prompts"),
        ("/v1/completions", {**GOOD, "suffix": "x"}, 400, "suffix is not served"),
        ("/v1/completions", {**GOOD, "best_of": 2}, 400, "best_of is not served"),
        ("/v1/completions", {**GOOD, "prompt": "\ud800"}, 400, "not UTF-8"),
        ("/v1/chat/completions", CHAT, 400, "no chat template"),
        ("/v1/chat/completions", {**CHAT, "tools": [{}]}, 400, "tools are not served"),
        ("/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        ("/v1/embeddings", GOOD, 404, "is not served"),
        ("/load_model", GOOD, 404, "is not served"),
        ("/reset", GOOD, 404, "is not served"),
        ("/health", GOOD, 405, "POST /health is not served"),
    ],
)
def test_mistakes_are_told(served, path, body, status, sentence):
    found, text = post(served[0], path, body)
    assert found == status and sentence in json.loads(text)["error"]["message"]


def test_what_is_left_out_is_the_room_that_is_left(client, served):
    answer = client.completions.create(model="tiny", prompt="the", temperature=0)
    assert answer.usage.total_tokens == served[1].context


def test_special_tokens_in_a_prompt_are_text_unless_asked_otherwise(client):
    ask = {"model": "tiny", "prompt": "<|bos|>the", "max_tokens": 1}
    as_text = client.completions.create(**ask).usage.prompt_tokens
    as_tokens = client.completions.create(**ask, extra_body={"parse_special_tokens": True}).usage.prompt_tokens
    assert as_text > as_tokens


def test_who_may_ask(folder):
    with running(folder, api_key="secret") as (port, _):
        assert post(port, "/v1/completions", GOOD)[0] == 401
        assert post(port, "/v1/completions", GOOD, {"Authorization": "Bearer secret2"})[0] == 401
        assert post(port, "/v1/completions", GOOD, {"Authorization": "Bearer secret"})[0] == 200
        assert post(port, "/v1/completions", GOOD, {"Authorization": "Bearer secret", "Host": "evil.example"})[0] == 403


def test_a_client_that_leaves_frees_its_row(served):
    port, answering = served
    body = json.dumps({**GOOD, "max_tokens": None, "stream": True}).encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as wire:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            wire.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            wire.recv(64)
    deadline = time.monotonic() + 20
    while answering.scheduler.in_use and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answering.scheduler.in_use == 0


def test_models_health_and_metrics(client, served):
    port, _ = served
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    before = read(port, "/metrics")
    client.completions.create(model="tiny", prompt="the", max_tokens=3)
    after = read(port, "/metrics")
    assert number(after, "poe_new_tokens_total") == number(before, "poe_new_tokens_total") + 3
    assert json.loads(read(port, "/health")) == {"status": "ok"}


def read(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return answer.read().decode()


def number(text, name):
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


@pytest.mark.slow
def test_a_thousand_requests_leave_memory_as_it_was(served):
    """Resident memory after a hundred requests is that after a thousand more, within 30 MiB."""
    ask = [{**GOOD, "prompt": f"the cat {number}", "max_tokens": 8, "stream": number % 2 == 0} for number in range(100)]
    sizes = []
    for _ in range(11):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda body: post(served[0], "/v1/completions", body)[0], ask))
        assert set(found) == {200}
        sizes.append(resident_bytes())
    assert sizes[-1] < sizes[0] + 30 * 2**20, [size // 2**20 for size in sizes]


def resident_bytes():
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
