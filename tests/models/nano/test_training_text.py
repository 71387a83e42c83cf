import random
from collections.abc import Iterator

import orjson
import pytest

from models.nano.batches import draw_examples, make_batch
from models.nano.data.banks import PHRASES, phrase_words, read_bank
from models.nano.data.conversation import Conversation, Reply, User, to_examples
from models.nano.data.drills import draw_drill
from models.nano.data.functions import FUNCTIONS
from models.nano.data.mixture import FAMILY, draw_family, draw_setting
from models.nano.data.source import Source, is_callable_alike, is_spelled_alike, part_of
from models.nano.data.tool_use import draw_tool_family, draw_tool_use
from models.nano.eval import is_right, parse_answer
from services.vocabulary import load_vocabulary


def draw_many(is_held_out: bool, count: int = 400) -> list[Conversation]:
    rng = random.Random(7)
    drawn: list[Conversation] = []
    while len(drawn) < count:
        drawn += draw_family(Source(rng, is_held_out), *draw_setting(rng))
    return drawn


def test_the_same_seed_gives_the_same_text() -> None:
    assert list(draw_examples("a", 12)) == list(draw_examples("a", 12)) != list(draw_examples("b", 12))


def test_no_user_message_of_the_evaluation_is_in_the_training_text() -> None:
    trained, held_out = (
        {message.text for one in draw_many(is_held_out) for message in one.messages if isinstance(message, User)}
        for is_held_out in (False, True)
    )
    assert len(trained) > 350 and len(held_out) > 350
    assert not trained & held_out


@pytest.mark.parametrize("name", sorted(file.stem for file in PHRASES.iterdir()))
def test_no_phrase_that_is_held_out_is_trained_in_other_letters(name: str) -> None:
    divided = {key: part for key, part in read_bank(name).items() if key != "closings"}  # of which either side draws any
    for phrases in list_phrases(divided):
        plain = [phrase.lower().strip(" .,:!?") for phrase in phrases]
        assert not set(part_of(plain, True)) & set(part_of(plain, False)) - {""}


def list_phrases(bank: object) -> Iterator[list[str]]:
    if isinstance(bank, dict):
        bank = list(bank.values())
    if isinstance(bank, list):
        if bank and all(isinstance(one, str) for one in bank):
            yield bank
        for one in bank:
            yield from list_phrases(one)


def test_words_and_pairs_of_numbers_are_divided() -> None:
    rng = random.Random(1)
    words = [{Source(rng, is_held_out).name() for _ in range(2000)} for is_held_out in (False, True)]
    pairs = [{Source(rng, is_held_out).pair(10, 99) for _ in range(2000)} for is_held_out in (False, True)]
    assert not words[0] & words[1]
    assert not {word.lower() for word in words[1]} & phrase_words()
    assert not pairs[0] & pairs[1]


@pytest.mark.parametrize("bank", ["ossia", "small_talk", "functions"])
def test_every_question_has_phrasings_on_both_sides(bank: str) -> None:
    lists = {
        "ossia": list(read_bank("ossia")["facts"].values()),
        "small_talk": list(read_bank("small_talk")["talk"].values()),
        "functions": [one.requests for one in FUNCTIONS] + [one.descriptions for one in FUNCTIONS],
    }[bank]
    assert all(len(phrases) >= 6 and len(set(phrases)) == len(phrases) for phrases in lists)


def test_no_question_about_ossia_has_two_answers() -> None:
    questions = [question.lower() for asked in read_bank("ossia")["facts"].values() for question in asked]
    assert len(questions) == len(set(questions))


def test_the_targets_are_what_the_model_says_after_the_prompt() -> None:
    vocabulary = load_vocabulary()
    for conversation in draw_many(is_held_out=False, count=100):
        (example,) = to_examples([conversation])
        said = vocabulary.decode(token_id for token_id, marked in zip(example.token_ids, example.is_target, strict=True) if marked)
        last_user = max(at for at, message in enumerate(conversation.messages) if isinstance(message, User))
        replies = [message for message in conversation.messages[last_user:] if isinstance(message, Reply)]
        before = [message.final for message in conversation.messages[:last_user] if isinstance(message, Reply) and not message.call]
        assert said == "".join(before) + "".join(reply.to_harmony() for reply in replies)


def test_what_the_text_teaches_is_wellformed_harmony() -> None:
    vocabulary = load_vocabulary()
    for conversation in draw_many(is_held_out=False, count=150):
        last = conversation.messages[-1]
        assert isinstance(last, Reply)
        answer = parse_answer(vocabulary.encode_harmony(last.to_harmony()))
        assert answer.is_wellformed and is_right(answer, last)
        assert answer.num_analysis_tokens > 0 or conversation.effort == "low"


def test_a_call_names_a_declared_tool_and_its_required_parameters() -> None:
    rng = random.Random(3)
    for _ in range(100):
        conversation = draw_tool_use(Source(rng, False), "medium", "2026-01-01")
        tools = {tool.name: tool for tool in conversation.tools}
        for call in [message.call for message in conversation.messages if isinstance(message, Reply) and message.call]:
            assert call.name in tools
            assert all(f'"{name}":' in call.arguments for name in tools[call.name].parameters["required"])  # type: ignore[attr-defined]


def test_a_drill_of_quoting_answers_with_the_words_in_their_order() -> None:
    rng = random.Random(8)
    drills = [draw_drill(Source(rng, False), "2026-01-01").messages[-2:] for _ in range(60)]
    quoted = [
        (user.text, reply.final) for user, reply in drills if isinstance(user, User) and isinstance(reply, Reply) and "JSON" in user.text
    ]
    assert len(quoted) > 10
    for text, answer in quoted:
        assert ", ".join(orjson.loads(answer)) in text


def test_a_family_shares_its_tools_as_prefix_and_no_target() -> None:
    rng = random.Random(4)
    family = draw_tool_family(Source(rng, False), "medium", "2026-01-01", [None] * FAMILY)
    examples, alone = to_examples(family), [to_examples([one])[0] for one in family]
    (prefix,) = {example.prefix for example in examples}
    assert load_vocabulary().decode(prefix).endswith("} // namespace functions<|end|><|start|>user<|message|>")
    for example, same in zip(examples, alone, strict=True):
        assert [*example.prefix, *example.token_ids] == [*same.prefix, *same.token_ids]
        assert sum(example.is_target) == sum(same.is_target) > 0


def test_words_are_told_apart_by_how_they_are_spelled() -> None:
    assert is_spelled_alike("Test") and not is_spelled_alike("Reykjavik")
    assert is_callable_alike("get_weather")


@pytest.mark.parametrize("is_held_out", [False, True])
def test_words_that_are_drawn_are_spelled_alike_after_a_space(is_held_out: bool) -> None:
    source = Source(random.Random(5), is_held_out)
    small = [draw() for draw in (source.lower_word, source.lower_name) for _ in range(500)]
    others = [draw() for draw in (source.name, source.real_word) for _ in range(500)]
    assert all(word.islower() for word in small)
    assert all(map(is_spelled_alike, small + others))


def test_a_batch_holds_every_token_once_and_each_prefix_once() -> None:
    examples = list(draw_examples("batch", 20))
    batch = make_batch(examples)
    prefixes = {example.prefix for example in examples}
    assert len(batch.token_ids) == sum(len(example.token_ids) for example in examples) + sum(map(len, prefixes))
    assert len(batch.before_targets) == sum(map(sum, (example.is_target for example in examples)))
    assert [block.rows.start for block in batch.blocks[1:]] == [block.rows.stop for block in batch.blocks[:-1]]
