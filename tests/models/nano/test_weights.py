"""The weights in the package: a sample of the evaluation finds what the whole one found, and the card says that."""

import re
from functools import cache
from math import sqrt
from pathlib import Path

import orjson
import pytest

import models.nano
from models.nano.cache import expanded_model
from models.nano.data.tool_use import EFFORTS
from models.nano.eval import MAX_TOKENS, TARGETS, TOOL_SKILLS, draw_cases, measure, misses, parse_answer
from models.nano.generate import Generator, load_backend
from tests.cluster.local_cluster import ROOT

PER_SKILL, SEED = 12, 2  # other conversations than those of the figures
PROMISED = {*TOOL_SKILLS, *(f"addition_{effort}" for effort in EFFORTS), *(skill for skills, _ in TARGETS.values() for skill in skills)}
GREEDY, SAMPLED = (
    orjson.loads((ROOT / "benchmarks" / "results" / f"nano_eval{which}.json").read_bytes())["measured"] for which in ("", "_sampled")
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    cases = [case for skill in sorted(PROMISED) for case in draw_cases(skill, PER_SKILL, SEED)]
    generator = Generator(load_backend(expanded_model(root=tmp_path_factory.mktemp("cache"))))
    generated = generator.generate([case.prompt for case in cases], 0.0, MAX_TOKENS)
    return measure(cases, [parse_answer(token_ids) for token_ids in generated])


@pytest.mark.parametrize("name", [name for name, one in GREEDY.items() if "target" in one])
def test_it_does_what_the_figures_say(name: str, sample: dict[str, dict[str, float]]) -> None:
    """Within three deviations of so small a sample, where that says anything at all. All right of some does not mean all of any others."""
    found, one = GREEDY[name], sample[name]
    share = (found["share"] * found["cases"] + 1) / (found["cases"] + 2)
    floor = share - 3 * sqrt(share * (1 - share) / one["cases"])
    assert 0 < floor <= one["share"]


@pytest.mark.parametrize("figures", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_figures_meet_what_is_promised(figures: dict[str, dict[str, float]]) -> None:
    assert not misses(figures)


def test_more_effort_is_more_reasoning(sample: dict[str, dict[str, float]]) -> None:
    low, medium, high = (sample[f"addition_{effort}"]["analysis_tokens"] for effort in ("low", "medium", "high"))
    assert 0 == low < medium < high


@cache
def card() -> dict[str, list[str]]:
    """[greedy share, sampled share, cases] by measure, as its table has them."""
    text = (Path(models.nano.__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\d.]+%) \| ([\d.]+%) \| (\d+) \|", text, re.MULTILINE)
    return {name: figures for name, *figures in rows}


@pytest.mark.parametrize("name", GREEDY)
def test_the_card_tells_the_figures(name: str) -> None:
    greedy, sampled = GREEDY[name], SAMPLED[name]
    assert greedy["cases"] == sampled["cases"]
    assert card()[name] == [f"{greedy['share']:.1%}", f"{sampled['share']:.1%}", str(int(greedy["cases"]))]
