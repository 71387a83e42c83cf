"""Constraints are followed token by token: masks are the same however the tokens came, and a failure is one sequence's own."""

import json
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from protos.ossia.v1.sampling_pb2 import Constraint, HarmonyStructure
from services.errors import ConstraintFailed
from services.vocabulary import CALL, END, END_OF_TEXT, RETURN, STOP_TOKEN_IDS, VOCAB_SIZE, load_vocabulary
from worker.grammar import MAX_COMPILED, GrammarCompiler, GrammarFollower, GrammarMasks, Words
from worker.sampling import sample
from worker.scripted.backend import ScriptedBackend, StepTimes
from worker.scripted.script import Script
from worker.sequences import SamplingParams, ScheduledSequence, Sequence

V = load_vocabulary()
CITY = json.dumps(
    {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": False}
)
GET = HarmonyStructure.Function(name="get", parameters_json_schema=CITY)
GET_ALL = HarmonyStructure.Function(name="get_all")
TO_GET = " to=functions.get<|channel|>commentary <|constrain|>json<|message|>"
ROME = '{"city":"Rome"}'
THOUGHT = "<|channel|>analysis<|message|>Free {] \n words<|end|><|start|>assistant"
ANSWER = "<|channel|>final<|message|>"
COMPILER = GrammarCompiler(STOP_TOKEN_IDS)


def harmony(**fields: object) -> bytes:
    return Constraint(harmony=HarmonyStructure(**fields)).SerializeToString()  # type: ignore[arg-type]  # a test's own words


def follow(constraint: bytes, text: str) -> GrammarFollower:
    follower = COMPILER.compile(constraint)
    for token_id in V.encode_harmony(text):
        follower.accept(token_id)
    return follower


def allows(constraint: bytes, text: str) -> bool:
    try:
        follow(constraint, text)
    except ConstraintFailed:
        return False
    return True


def members(words: Words) -> set[int]:
    return set(np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0].tolist())


REQUIRED = harmony(functions=[GET, GET_ALL], call_required=True)
SINGLE = harmony(functions=[GET], call_required=True, single_call=True)
SHAPED = harmony(final_json_schema=CITY)
BOTH = harmony(final_json_schema=CITY, functions=[GET])
AUTO = harmony(functions=[GET])


@pytest.mark.parametrize(
    ("constraint", "turn"),
    [
        (REQUIRED, f"{TO_GET}{ROME}<|call|>"),
        (REQUIRED, f"{THOUGHT}{TO_GET}{ROME}<|call|>"),
        (REQUIRED, f"<|channel|>commentary to=functions.get <|constrain|>json<|message|>{ROME}<|call|>"),
        (REQUIRED, f"<|channel|>analysis to=functions.get json<|message|>{ROME}<|call|>"),
        (REQUIRED, " to=functions.get_all<|channel|>commentary<|message|>{}<|call|>"),
        (REQUIRED, f"{TO_GET}{ROME}<|end|><|start|>assistant{THOUGHT}{TO_GET}{ROME}<|call|>"),
        (REQUIRED, f"<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant{TO_GET}{ROME}<|call|>"),
        (SINGLE, f"{THOUGHT}{THOUGHT}{TO_GET}{ROME}<|call|>"),
        (SHAPED, f"{THOUGHT}{ANSWER}{ROME}<|return|>"),
        (SHAPED, f"<|channel|>final <|constrain|>json<|message|>{ROME}<|return|>"),
        (BOTH, f"{ANSWER}{ROME}<|return|>"),
        (BOTH, f"{TO_GET}{ROME}<|call|>"),
        (AUTO, f"{ANSWER}Any words.<|return|>"),
        (AUTO, f'{TO_GET}{{\n  "city": "Oslo"\n}}<|call|>'),
    ],
)
def test_a_turn_as_asked_for_is_allowed(constraint: bytes, turn: str) -> None:
    assert allows(constraint, turn)


@pytest.mark.parametrize(
    ("constraint", "turn"),
    [
        (REQUIRED, ANSWER),  # a call is required
        (REQUIRED, " to=functions.other"),  # there is no such function
        (REQUIRED, TO_GET + '{"city":"Paris"'),
        (REQUIRED, f"{TO_GET}{ROME}<|end|><|start|>assistant{ANSWER}"),  # after a call that is followed, calls only
        (SINGLE, f"{TO_GET}{ROME}<|end|>"),
        (SINGLE, f"{TO_GET}{ROME}<|return|>"),
        (SHAPED, ANSWER + "Rome"),
        (SHAPED, TO_GET),  # no tools, no calls
        (SHAPED, "<|channel|>commentary<|message|>"),  # visible words beside JSON
        (SHAPED, f"{ANSWER}{ROME}<|end|>"),
        (SHAPED, ANSWER + "{" + " " * 40),
        (BOTH, f"{TO_GET}Rome"),
        (AUTO, "plain words without a header"),
        (AUTO, f"{ANSWER}Any<|channel|>"),
    ],
)
def test_anything_else_is_not(constraint: bytes, turn: str) -> None:
    assert not allows(constraint, turn)


def test_a_functions_name_brings_in_no_control_token() -> None:
    evil = harmony(functions=[HarmonyStructure.Function(name="f<|return|>")], call_required=True)
    follower = follow(evil, " to=functions.f")
    assert RETURN not in members(follower.allowed())


def test_what_may_come_next_is_exactly_what_the_grammar_says() -> None:
    assert members(follow(SINGLE, f"{TO_GET}{ROME}").allowed()) & {CALL, END, RETURN} == {CALL}
    assert members(follow(REQUIRED, f"{TO_GET}{ROME}").allowed()) & {CALL, END, RETURN} == {CALL, END}
    assert len(members(follow(SHAPED, "<|channel|>analysis<|message|>So").allowed())) > 199_000
    assert members(follow(SHAPED, f"{ANSWER}{ROME}<|return|>").allowed()) == set(STOP_TOKEN_IDS)


@pytest.mark.parametrize(
    ("constraint", "whole", "cut"),
    [
        (Constraint(regex="[a-c]+/[0-9]"), "abc/7", "abc/"),
        (Constraint(json_schema=CITY), ROME, '{"city":'),
        (Constraint(lark='start: <|channel|> "final" <|message|> /[a-z]+/'), "<|channel|>final<|message|>words", "<|channel|>final"),
    ],
    ids=["regex", "json_schema", "lark"],
)
def test_a_whole_output_ends_with_the_models_own_end_tokens(constraint: Constraint, whole: str, cut: str) -> None:
    wire = constraint.SerializeToString()
    ending = members(follow(wire, whole).allowed())
    assert set(STOP_TOKEN_IDS) <= ending and END_OF_TEXT not in ending
    assert not members(follow(wire, cut).allowed()) & set(STOP_TOKEN_IDS)
    ended = follow(wire, whole)
    ended.accept(RETURN)
    assert members(ended.allowed()) == set(STOP_TOKEN_IDS)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(json_schema="{"),
        Constraint(json_schema='{"not": {}}'),
        Constraint(json_schema='{"const": -9223372036854775807}'),
        Constraint(regex="("),
        Constraint(lark="start: nothing_here"),
        Constraint(harmony=HarmonyStructure(call_required=True)),
    ],
)
def test_a_constraint_that_makes_no_grammar_says_why(constraint: Constraint) -> None:
    with pytest.raises(ConstraintFailed, match="constraint"):
        COMPILER.compile(constraint.SerializeToString())


def test_compiled_grammars_are_kept_within_a_bound() -> None:
    compiler = GrammarCompiler(STOP_TOKEN_IDS)
    for number in range(MAX_COMPILED + 5):
        compiler.compile(Constraint(regex=f"a{{{number + 1}}}").SerializeToString())
    assert len(compiler._compiled) == MAX_COMPILED


def a_sequence(seq_id: int, constraint: bytes = b"", generated: Iterable[int] = (), **params: object) -> Sequence:
    return Sequence(seq_id, "", [1, 2, *generated], 2, SamplingParams(temperature=0.0, constraint=constraint, **params))  # type: ignore[arg-type]


def masks_of(masks: GrammarMasks, *sequences: Sequence) -> tuple[dict[int, Words], list[str]]:
    step = masks.start([ScheduledSequence(one, 1) for one in sequences], sequences)
    found, failed = step.take()
    return found, [f"{one.seq_id}: {one.error.__name__}" for one in failed]


def test_a_resumed_sequence_goes_on_where_the_first_one_was() -> None:
    turn = V.encode_harmony(f"{THOUGHT}{TO_GET}{ROME}<|call|>")
    masks, walking = GrammarMasks(STOP_TOKEN_IDS), a_sequence(1, SINGLE)
    for at, token_id in enumerate(turn):
        stepped, _ = masks_of(masks, walking)
        resumed, _ = masks_of(masks, a_sequence(2, SINGLE, turn[:at]))
        assert np.array_equal(stepped[0], resumed[0])
        walking.token_ids.append(token_id)


def test_a_broken_constraint_ends_its_sequence_and_no_other() -> None:
    masks = GrammarMasks(STOP_TOKEN_IDS)
    broken, bad = a_sequence(1, SINGLE, V.encode("Hello")), a_sequence(2, Constraint(regex="(").SerializeToString())
    found, failed = masks_of(masks, broken, a_sequence(3), bad, a_sequence(4, SINGLE))
    assert failed == ["1: ConstraintFailed", "2: ConstraintFailed"]
    assert list(found) == [3]  # the row of sequence 4; sequence 3 is free


def test_followers_go_with_their_sequences() -> None:
    masks = GrammarMasks(STOP_TOKEN_IDS)
    sequence = a_sequence(1, SINGLE)
    masks_of(masks, sequence)
    assert len(masks._followers) == 1
    masks._pool.shutdown()  # its thread lets go of the sequence a moment after the mask is there
    del sequence
    assert not masks._followers


def test_a_draw_keeps_to_its_mask_and_leaves_other_rows_alone() -> None:
    logits = torch.zeros(20, VOCAB_SIZE)
    logits[:, 7] = 5.0
    (found, _) = masks_of(GrammarMasks(STOP_TOKEN_IDS), a_sequence(1, SINGLE, V.encode_harmony(f"{TO_GET}{ROME}")))
    drawn, failed = sample(logits, [a_sequence(row) for row in range(20)], {18: found[0]})
    assert not failed
    assert [one.token_id for one in drawn] == [7] * 18 + [CALL, 7]


def test_min_tokens_gives_way_where_only_the_end_is_left() -> None:
    (found, _) = masks_of(GrammarMasks(STOP_TOKEN_IDS), a_sequence(1, SINGLE, V.encode_harmony(f"{TO_GET}{ROME}")))
    late = a_sequence(1, min_tokens=100, banned_token_ids=STOP_TOKEN_IDS)
    drawn, failed = sample(torch.zeros(1, VOCAB_SIZE), [late], {0: found[0]})
    assert [one.token_id for one in drawn] == [CALL] and not failed


@pytest.mark.parametrize(("constraint", "error"), [(SHAPED, None), (SINGLE, ConstraintFailed)], ids=["kept", "broken"])
def test_a_script_is_held_against_the_constraint(constraint: bytes, error: type[ConstraintFailed] | None) -> None:
    reply = f"{THOUGHT}{ANSWER}{ROME}<|return|>"
    sizes = {"block_size": 4, "num_full_blocks": 8, "num_window_blocks": 8, "sliding_window": 6, "max_model_len": 100}
    backend, sequence = ScriptedBackend(Script(default=reply), StepTimes(), **sizes), a_sequence(1, constraint)
    sequence.full_block_ids, sequence.window_block_ids = [0], [0]
    output = backend.step([ScheduledSequence(sequence, 2)], ())
    assert [one.token_id for one in output.drawn] == ([] if error else V.encode_harmony(reply)[:1])
    assert [one.error for one in output.failed] == ([error] if error else [])
