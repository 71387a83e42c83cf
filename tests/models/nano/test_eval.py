import pytest

from models.nano.data.conversation import Call, Reply
from models.nano.eval import SKILLS, Answer, Case, draw_cases, is_right, measure, misses, parse_answer
from services.vocabulary import load_vocabulary

FINAL = "<|channel|>final<|message|>Hello!<|return|>"
CALL = " to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>"


def parse(text: str) -> Answer:
    return parse_answer(load_vocabulary().encode_harmony(text))


def test_an_answer_is_read_with_its_reasoning() -> None:
    answer = parse(f"<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant{FINAL}")
    assert answer == Answer(is_wellformed=True, num_analysis_tokens=7, function="", text="Hello!")


def test_a_call_is_right_with_equal_json_and_the_same_name() -> None:
    expected = Reply(call=Call("get_weather", '{"city":"Brunle"}'))
    assert is_right(parse(CALL + '{ "city": "Brunle" }<|call|>'), expected)
    assert not is_right(parse(CALL + '{"city":"Brun"}<|call|>'), expected)
    assert not is_right(parse(CALL + '{"city":"Brunle"<|call|>'), expected)
    assert not is_right(parse(CALL.replace("weather", "time") + '{"city":"Brunle"}<|call|>'), expected)
    assert not is_right(parse(FINAL), expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello!<|return|>",
        "<|channel|>final<|message|>Hello!",
        "<|channel|>analysis<|message|>Only that.<|return|>",
        "<|channel|>loud<|message|>Hello!<|return|>",
        f"<|channel|>final<|message|>Twice<|end|><|start|>assistant{FINAL}",
        f"<|channel|>analysis<|message|>Never closed<|start|>assistant{FINAL}",
    ],
)
def test_what_is_not_wellformed_counts_as_such(text: str) -> None:
    assert not parse(text).is_wellformed


def test_every_skill_draws_cases_of_its_own() -> None:
    for skill in SKILLS:
        cases = list(draw_cases(skill, 2, seed=5))
        assert len(cases) >= 2 and {case.skill for case in cases} == {skill}
        assert cases == list(draw_cases(skill, 2, seed=5))
        assert all(len(case.prompt) < 2100 for case in cases)


def test_what_is_missed_is_said() -> None:
    cases = [Case(f"addition_{effort}", [], Reply("4")) for effort in ("low", "medium", "high")]
    right = [Answer(True, length, "", "4") for length in (0, 9, 20)]
    assert misses(measure(cases, right)) == []
    assert misses(measure(cases, [*right[:2], Answer(True, 20, "", "5")])) == ["addition_high"]
    assert misses(measure(cases, [right[0], right[2], right[1]])) == ["effort"]
    assert misses(measure(cases, [*right[:2], Answer(False, 20, "", "4")])) == ["harmony_wellformed"]
