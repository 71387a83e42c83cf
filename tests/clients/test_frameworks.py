"""Frameworks over OpenAI's API run a tool loop: LangChain's ChatOpenAI and OpenAI's Agents SDK, each over chat and over responses."""

from typing import Any

import pytest
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.clients.conftest import ANSWER, MODEL, PLACE, SUNNY
from tests.cluster.local_cluster import LocalCluster
from tests.edge.scripted_scheduler import PATIENCE_S

QUESTION = "What is the weather in Oslo?"
set_tracing_disabled(True)  # it would send traces away


class Place(BaseModel):
    city: str
    degrees: float


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_langchain_runs_a_tool_loop_streams_and_parses(cluster: LocalCluster, use_responses_api: bool) -> None:
    model = ChatOpenAI(model=MODEL, base_url=f"{cluster.url}/v1", api_key="any", timeout=PATIENCE_S, use_responses_api=use_responses_api)  # type: ignore[arg-type]
    with_tools = model.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(QUESTION)]
    turn = with_tools.invoke(messages)
    assert [(call["name"], call["args"]) for call in turn.tool_calls] == [("get_weather", {"city": "Oslo"})]
    results = [ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"]) for call in turn.tool_calls]
    assert with_tools.invoke([*messages, turn, *results]).text == SUNNY
    assert "".join(chunk.text for chunk in model.stream("Hello")) == ANSWER
    assert model.with_structured_output(Place).invoke("A place") == Place.model_validate(PLACE)


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_the_agents_sdk_runs_a_tool_loop(cluster: LocalCluster, kind: Any, is_streamed: bool) -> None:
    asked: list[str] = []

    @function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "sunny"

    async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="any", timeout=PATIENCE_S) as client:
        agent = Agent(name="guide", instructions="Use your tools.", tools=[get_weather], model=kind(model=MODEL, openai_client=client))
        if is_streamed:
            running = Runner.run_streamed(agent, QUESTION)
            async for _ in running.stream_events():
                pass
            output = running.final_output
        else:
            output = (await Runner.run(agent, QUESTION)).final_output
    assert (output, asked) == (SUNNY, ["Oslo"])
