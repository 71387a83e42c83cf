"""What the operator sets for each model: other names, defaults, prices."""

from pathlib import Path

import pytest

from edge.config import EdgeConfig
from edge.routing.model_settings import Defaults, read_settings
from services.config import ConfigError
from tests.edge.scripted_scheduler import MODEL, stand

SETTINGS = f"""
models:
  {MODEL}:
    aliases: [gpt-4o]
    defaults: {{max_tokens: 7, reasoning_effort: high}}
    price: {{input: 1.0, cached_input: 0.5, output: 2.0}}
"""


async def test_an_alias_is_answered_with_the_models_defaults_and_price(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(SETTINGS)
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi"}]}
    async with stand(models_file=path, default_top_p=0.5) as it, it.http() as http:
        got = (await http.post("/v1/chat/completions", json=body)).json()
        metrics = (await http.get("/v1/metrics")).text
        card = (await http.get("/v1/models/gpt-4o")).json()
    params = it.scheduler.requests[0].sampling
    assert (got["model"], params.max_tokens, params.top_p, round(params.temperature, 3)) == (MODEL, 7, 0.5, 0.7)
    usage = got["usage"]
    cost = (usage["prompt_tokens"] - 16 + 16 * 0.5 + usage["completion_tokens"] * 2) / 1e6
    assert f'oss_token_cost_usd{{model="{MODEL}"}} {cost}' in metrics
    assert card["id"] == MODEL


def test_the_demonstration_model_takes_the_likeliest_token_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    assert read_settings(EdgeConfig(default_top_p=0.5))["ossia-nano"].defaults == Defaults(max_tokens=1024, temperature=0.0, top_p=0.5)
    path.write_text("models: {ossia-nano: {defaults: {temperature: 1.0}}}")
    assert read_settings(EdgeConfig(models_file=path))["ossia-nano"].defaults == Defaults(max_tokens=1024, temperature=1.0)


FAULTS = ("defaults: {temperature: 9}", "defaults: 3", "aliases: [a]", "hue: 1")


@pytest.mark.parametrize("text", ["models: 5", "a: [", *(f"models: {{a: {{{fault}}}}}" for fault in FAULTS)])
def test_a_wrong_file_is_one_line_that_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--models-file .*models\.yaml: .+"):
        read_settings(EdgeConfig(models_file=path))


@pytest.mark.parametrize(
    ("content", "fields", "expected"),
    [
        ("Reasoning: high", {}, "high"),
        ("You are kind.\nreasoning: LOW\n", {}, "low"),
        ("Reasoning: high", {"reasoning_effort": "low"}, "low"),
        ("Reasoning: high", {"reasoning_level": "low"}, "low"),
        ("Explain your reasoning: high quality", {}, "medium"),
    ],
)
async def test_the_parameter_wins_over_the_instructions_over_the_default(content: str, fields: dict[str, str], expected: str) -> None:
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "Reasoning: high"}]
    async with stand() as it, it.http() as http:
        await http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, **fields})
        prompt = it.edge.service._vocabulary.decode(it.scheduler.requests[0].prompt_token_ids)
    assert f"Reasoning: {expected}\n\n# Valid channels" in prompt
