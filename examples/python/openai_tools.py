"""Lets a model call a function: `python examples/python/openai_tools.py http://127.0.0.1:8000 ossia-nano "Is it cold in Oslo?"`."""

import json
import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageParam, ChatCompletionToolUnionParam

TOOL: ChatCompletionToolUnionParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def get_weather(city: str) -> dict[str, object]:
    """Stands for a service that would be asked."""
    return {"temperature": 11, "sky": "rainy"}


def main(url: str, model: str, question: str) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:

        def ask() -> ChatCompletionMessage:
            return client.chat.completions.create(model=model, messages=messages, tools=[TOOL]).choices[0].message

        while (answer := ask()).tool_calls:
            messages.append(answer.to_dict())  # type: ignore[arg-type]  # its reasoning goes back too: the model goes on from there
            for call in answer.tool_calls:
                result = json.dumps(get_weather(**json.loads(call.function.arguments)))
                print(f"get_weather {call.function.arguments} -> {result}")
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print(answer.content)


if __name__ == "__main__":
    main(*sys.argv[1:4])
