"""Streams one answer with OpenAI's client: `python examples/python/openai_chat.py http://127.0.0.1:8000 ossia-nano "question"`."""

import sys

from openai import OpenAI


def main(url: str, model: str, question: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], stream=True)
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:4])
