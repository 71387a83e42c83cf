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
FOUND = orjson.loads((ROOT / "benchmarks" / "results" / "nano_eval.json").read_bytes())["measured"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    cases = [case for skill in sorted(PROMISED) for case in draw_cases(skill, PER_SKILL, SEED)]
    generator = Generator(load_backend(expanded_model(root=tmp_path_factory.mktemp("cache"))))
    generated = generator.generate([case.prompt for case in cases], 0.0, MAX_TOKENS)
    return measure(cases, [parse_answer(token_ids) for token_ids in generated])


@pytest.mark.parametrize("name", [name for name, one in FOUND.items() if "target" in one])
def test_it_does_what_the_figures_say(name: str, sampled: dict[str, dict[str, float]]) -> None:
    """Within three deviations of so small a sample, where that says anything at all. All right of some does not mean all of any others."""
    found, one = FOUND[name], sampled[name]
    share = (found["share"] * found["cases"] + 1) / (found["cases"] + 2)
    floor = share - 3 * sqrt(share * (1 - share) / one["cases"])
    assert 0 < floor <= one["share"]


def test_the_figures_meet_what_is_promised() -> None:
    assert not misses(FOUND)


def test_more_effort_is_more_reasoning(sampled: dict[str, dict[str, float]]) -> None:
    low, medium, high = (sampled[f"addition_{effort}"]["analysis_tokens"] for effort in ("low", "medium", "high"))
    assert 0 == low < medium < high


@cache
def card() -> dict[str, tuple[str, str]]:
    """(share, cases) by measure, as its table has them."""
    text = (Path(models.nano.__file__).parent / "README.md").read_text()
    return {name: (share, cases) for name, share, cases in re.findall(r"^\| (\w+) \| ([\d.]+%) \| (\d+) \|", text, re.MULTILINE)}


@pytest.mark.parametrize("name", FOUND)
def test_the_card_tells_the_figures(name: str) -> None:
    assert card()[name] == (f"{FOUND[name]['share']:.1%}", str(int(FOUND[name]["cases"])))
