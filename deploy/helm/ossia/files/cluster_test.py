"""What `helm test` asks of a running cluster: its models, one chat, one stream and, where access is guarded, one refusal.

Runs in the control image; knows nothing but the REST door.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_S = 120.0
MESSAGES = [{"role": "user", "content": "Say hello."}]


class Failed(Exception):
    """The cluster did not do what it should; the message is one sentence."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the REST door, as in http://edge:80")
    parser.add_argument("--key-file", type=Path, help="file with an API key")
    parser.add_argument("--auth", action="store_true", help="a request without a key has to be refused")
    parser.add_argument("--any-certificate", action="store_true", help="take the door's certificate whatever it names")
    options = parser.parse_args(argv)
    headers = {"Authorization": f"Bearer {options.key_file.read_text().strip()}"} if options.key_file else {}
    try:
        with httpx.Client(base_url=options.url, timeout=TIMEOUT_S, verify=not options.any_certificate) as client:
            if options.auth:
                check_refusal(client)
            if options.auth and not options.key_file:
                print("no key is given, so only the refusal is tested: name a secret with one in tests.existingSecret")
                return 0
            client.headers.update(headers)
            model = check_models(client)
            check_chat(client, model)
            check_stream(client, model)
    except (Failed, httpx.HTTPError) as failure:
        print(f"FAILED: {failure or type(failure).__name__}", file=sys.stderr)
        return 1
    return 0


def check_refusal(client: httpx.Client) -> None:
    status = client.get("/v1/models").status_code
    if status != 401:
        raise Failed(f"a request without a key was answered with {status}, not 401")
    print("refusal: ok")


def check_models(client: httpx.Client) -> str:
    """The first model that is served."""
    models = read(client.get("/v1/models"))["data"]
    if not models:
        raise Failed("no model is served: look at the workers' logs")
    print(f"models: {', '.join(model['id'] for model in models)}")
    return str(models[0]["id"])


def check_chat(client: httpx.Client, model: str) -> None:
    answer = read(client.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES, "max_tokens": 16}))
    if not answer["choices"][0]["finish_reason"] or not answer["usage"]["completion_tokens"]:
        raise Failed(f"the chat did not end well: {answer}")
    print(f"chat: {answer['usage']['completion_tokens']} tokens")


def check_stream(client: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 16, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            raise Failed(f"the stream was answered with {response.status_code}")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise Failed("the stream broke off")
    chunks = [json.loads(event) for event in events[:-1]]
    if not any(choice.get("finish_reason") for chunk in chunks for choice in chunk.get("choices", ())):
        raise Failed("the stream ended without a finish_reason")
    print(f"stream: {len(chunks)} chunks")


def read(response: httpx.Response) -> Any:
    if response.is_error:
        raise Failed(f"{response.request.url.path} was answered with {response.status_code}: {response.text[:200]}")
    return response.json()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
