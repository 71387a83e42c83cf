"""Conversations with a running cluster as they happened, for the README: `python -m models.nano.transcripts http://127.0.0.1:8000`.

With `--into FILE` they replace what stands between the two marks in that file.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from openai import OpenAI, omit
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageParam, ChatCompletionToolUnionParam

from models.nano.cache import NANO_NAME

BEGIN, END = "<!-- transcripts: begin -->\n", "<!-- transcripts: end -->\n"
CITY = "Limerick"  # in no text that it was trained on
WEATHER = {"temperature": 11, "sky": "rainy"}
MAX_TOKENS = 256  # of one message; all of these need fewer
TOOLS: list[ChatCompletionToolUnionParam] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name, description in (("get_weather", "Get the weather in a city"), ("find_hotel", "Find a hotel in a city"))
]
DOCUMENT = (
    "The phone number of Aldric is 4471. Brenna works for Quillo. The room of Aldric is 208. Nothing else was found. "
    "The owner of the boat is Tessaly. The room of Brenna is 315."
)


Played = list[ChatCompletionMessage | str]  # the model's messages, and what its tools gave back


@dataclass(frozen=True)
class Scene:
    """One request of a user, how it is asked, and what it shows."""

    title: str
    user: str
    reasoning_effort: Literal["low", "medium", "high"] = "low"
    wants_json: bool = False
    has_tools: bool = False


SCENES = (
    Scene("A greeting", "Hello"),
    Scene("About Ossia", "How do I start Ossia?"),
    Scene("A sum, with its steps", "What is 17 + 25?", reasoning_effort="high"),
    Scene("A question about a document", f"{DOCUMENT}\n\nTell me the room of Brenna."),
    Scene("A tool, in two turns", f"What is the weather in {CITY}?", has_tools=True),
    Scene("A JSON object", f"Write JSON with city = {CITY} and price = 120.", wants_json=True),
    Scene("What it does not know, with its reasoning", "What is the capital of France?", reasoning_effort="high"),
)


def play(client: OpenAI, scene: Scene) -> Played:
    """The model's messages in turn; where the first one calls a tool, what that gave back, which is always WEATHER, and the next one."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": scene.user}]
    answer = ask(client, scene, messages)
    if not answer.tool_calls:
        return [answer]
    result = json.dumps(WEATHER)
    messages.append(cast(ChatCompletionMessageParam, answer.model_dump(exclude_none=True)))
    messages.append({"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": result})
    return [answer, result, ask(client, scene, messages)]


def ask(client: OpenAI, scene: Scene, messages: list[ChatCompletionMessageParam]) -> ChatCompletionMessage:
    completion = client.chat.completions.create(
        model=NANO_NAME,
        messages=messages,
        max_tokens=MAX_TOKENS,
        reasoning_effort=scene.reasoning_effort,
        tools=TOOLS if scene.has_tools else omit,
        response_format={"type": "json_object"} if scene.wants_json else omit,
        extra_body={"conversation_date": "2026-01-01"},
    )
    return completion.choices[0].message


def tell(scene: Scene, played: Played) -> Iterator[str]:
    """The conversation as lines of text."""
    yield f"> {scene.user}"
    for message in played:
        if isinstance(message, str):
            yield f"  (the tool) {message}"
            continue
        if reasoning := (message.model_extra or {}).get("reasoning"):
            yield f"  (thinks) {reasoning}"
        for call in message.tool_calls or ():
            assert call.type == "function"
            yield f"  (calls) {call.function.name} {call.function.arguments}"
        if message.content:
            yield message.content


def render(played: Iterable[tuple[Scene, Played]]) -> str:
    """The scenes as Markdown."""
    return "\n".join("\n".join((f"{scene.title}:\n", "```", *tell(scene, messages), "```\n")) for scene, messages in played)


def replace(page: str, transcripts: str) -> str:
    """The page with these transcripts between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{transcripts}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the REST door of a running cluster")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write them between the marks in this page")
    arguments = parser.parse_args()
    with OpenAI(base_url=f"{arguments.url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
        transcripts = render((scene, play(client, scene)) for scene in SCENES)
    if arguments.into is None:
        print(transcripts, end="")
    else:
        arguments.into.write_text(replace(arguments.into.read_text(), transcripts))


if __name__ == "__main__":
    main()
