"""The scripted backend: which reply a prompt gets, token by token, and that mixed-up blocks are noticed."""

from pathlib import Path

import pytest

from services.vocabulary import RETURN, load_vocabulary
from worker.backend import BlockCopy
from worker.scripted.backend import ScriptedBackend, StepTimes
from worker.scripted.script import DEFAULT_REPLY, Rule, Script, ScriptError, read_script
from worker.sequences import SamplingParams, ScheduledSequence, Sequence

REPLY = "<|channel|>final<|message|>One two three four five.<|return|>"
SCRIPT = """
rules:
  - contains: ["weather", "<|start|>user"]
    lacks: ["sunny"]
    reply: "<|channel|>final<|message|>Rain.<|return|>"
  - contains: ["weather"]
    reply: "<|channel|>final<|message|>Sun.<|return|>"
default: "<|channel|>final<|message|>What?<|return|>"
"""


@pytest.fixture
def backend() -> ScriptedBackend:
    return make_backend(num_host_blocks=0)


@pytest.fixture
def host_backend() -> ScriptedBackend:
    return make_backend(num_host_blocks=4)


def make_backend(num_host_blocks: int) -> ScriptedBackend:
    return ScriptedBackend(
        Script(default=REPLY),
        StepTimes(),
        block_size=4,
        num_full_blocks=32,
        num_window_blocks=32,
        sliding_window=6,
        max_model_len=100,
        num_host_blocks=num_host_blocks,
    )


def make_sequence(seq_id: int, num_prompt_tokens: int, blocks: list[int], token_ids: list[int] | None = None) -> Sequence:
    known = token_ids or list(range(100, 100 + num_prompt_tokens))
    return Sequence(seq_id, "", known, num_prompt_tokens, SamplingParams(), full_block_ids=blocks, window_block_ids=blocks.copy())


def compute(backend: ScriptedBackend, sequence: Sequence, num_tokens: int, copies: tuple[BlockCopy, ...] = ()) -> str | None:
    """One step of one sequence, recorded as the table would; the fault that the backend found, if any."""
    output = backend.step([ScheduledSequence(sequence, num_tokens)], copies)
    sequence.num_computed_tokens += num_tokens
    sequence.token_ids.extend(drawn.token_id for drawn in output.drawn)
    return output.failed[0].message if output.failed else None


def test_the_first_rule_that_fits_answers(tmp_path: Path) -> None:
    (tmp_path / "script.yaml").write_text(SCRIPT)
    script = read_script(tmp_path / "script.yaml")
    assert "Rain" in script.reply_to("<|start|>user<|message|>How is the weather?")
    assert "Sun" in script.reply_to("<|start|>user<|message|>Is the weather sunny?")
    assert "What" in script.reply_to("weath er")
    assert Script((Rule((), (), "any"),)).reply_to("") == "any"


def test_an_empty_script_has_the_default_answer(tmp_path: Path) -> None:
    (tmp_path / "script.yaml").write_text("")
    assert read_script(tmp_path / "script.yaml").reply_to("anything") == DEFAULT_REPLY


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rules: [{contains: [a]}]", "rules.0.reply"),
        ("rules: [{reply: x, containing: [a]}]", "rules.0.containing"),
        ("rules: [{reply: x, contains: a}]", "rules.0.contains"),
        ("default: 5", "default"),
        ("[1, 2]", "the whole"),
        ("rules: [", "not YAML"),
        ("default: !!python/object/apply:os.system [true]", "not YAML"),
    ],
)
def test_a_bad_script_is_refused_in_one_sentence(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "script.yaml").write_text(text)
    with pytest.raises(ScriptError) as raised:
        read_script(tmp_path / "script.yaml")
    assert named in str(raised.value)
    assert "script.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_script_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match="absent"):
        read_script(tmp_path / "absent.yaml")


def test_the_reply_comes_by_token_position_and_then_ends(backend: ScriptedBackend) -> None:
    reply = load_vocabulary().encode_harmony(REPLY)
    sequence = make_sequence(1, 7, list(range(10)))
    for chunk in (3, 4, *[1] * (len(reply) + 1)):
        assert compute(backend, sequence, chunk) is None
    assert sequence.token_ids[7:] == [*reply, RETURN, RETURN]


def test_a_resumed_sequence_goes_on_where_it_was(backend: ScriptedBackend) -> None:
    reply = load_vocabulary().encode_harmony(REPLY)
    sequence = make_sequence(1, 7, list(range(10)), token_ids=[*range(100, 107), *reply[:3]])
    assert compute(backend, sequence, 10) is None
    assert sequence.token_ids[-1] == reply[3]


def test_sequences_with_one_prefix_share_its_blocks(backend: ScriptedBackend) -> None:
    first, second = make_sequence(1, 9, [0, 1, 2]), make_sequence(2, 9, [0, 1, 5])
    assert compute(backend, first, 9) is None
    second.num_computed_tokens = 8
    assert compute(backend, second, 1) is None


def test_a_block_written_in_the_same_step_may_be_shared(backend: ScriptedBackend) -> None:
    first, second = make_sequence(1, 9, [0, 1, 2]), make_sequence(2, 9, [0, 1, 5])
    second.num_computed_tokens = 8
    output = backend.step([ScheduledSequence(second, 1), ScheduledSequence(first, 9)], ())
    assert not output.failed


def test_another_prefix_in_a_shared_block_is_noticed(backend: ScriptedBackend) -> None:
    first, second = make_sequence(1, 9, [0, 1, 2]), make_sequence(2, 9, [0, 1, 5], token_ids=[1, *range(101, 109)])
    assert compute(backend, first, 9) is None
    second.num_computed_tokens = 8
    fault = compute(backend, second, 1)
    assert fault is not None
    assert "full block 0" in fault


def test_a_block_given_away_too_early_is_noticed(backend: ScriptedBackend) -> None:
    first, thief = make_sequence(1, 9, [0, 1, 2]), make_sequence(2, 2, [1], token_ids=[5, 6])
    assert compute(backend, first, 9) is None
    assert compute(backend, thief, 2) is None
    fault = compute(backend, first, 1)
    assert fault is not None
    assert "full block 1, entry 1" in fault


def test_one_overwritten_slot_in_the_middle_is_noticed(backend: ScriptedBackend) -> None:
    first = make_sequence(1, 8, [0, 1])
    assert compute(backend, first, 8) is None
    thief = make_sequence(2, 6, [7, 1], token_ids=[9, 8, 7, 6, 5, 4])
    assert compute(backend, thief, 5) is None  # writes slot 0 of block 1
    first.full_block_ids.append(2)
    first.window_block_ids.append(2)
    assert compute(backend, first, 1) is not None


def test_the_window_table_is_checked_within_the_window_only(backend: ScriptedBackend) -> None:
    sequence = make_sequence(1, 15, list(range(6)))
    assert compute(backend, sequence, 15) is None
    sequence.window_block_ids[0:2] = [31, 31]  # positions 0 to 7 have passed: the next token attends from 10 on
    assert compute(backend, sequence, 1) is None
    sequence.window_block_ids[2] = 31  # positions 8 to 11
    fault = compute(backend, sequence, 1)
    assert fault is not None
    assert "window block 31, entry 2" in fault


def test_copied_blocks_hold_what_their_source_held(backend: ScriptedBackend) -> None:
    sequence = make_sequence(1, 9, [0, 1, 2])
    assert compute(backend, sequence, 9) is None
    sequence.full_block_ids, sequence.window_block_ids = [8, 1, 2], [0, 9, 2]
    assert compute(backend, sequence, 1, (BlockCopy(False, 0, 8), BlockCopy(True, 1, 9))) is None


def test_blocks_come_back_from_host_memory_as_they_went(host_backend: ScriptedBackend) -> None:
    sequence = make_sequence(1, 9, [0, 1, 2])
    away = (BlockCopy(False, 0, 3, target_on_host=True), BlockCopy(True, 1, 2, target_on_host=True))
    back = (BlockCopy(False, 3, 8, source_on_host=True), BlockCopy(True, 2, 9, source_on_host=True))
    assert compute(host_backend, sequence, 9) is None
    sequence.full_block_ids, sequence.window_block_ids = [8, 1, 2], [0, 9, 2]
    assert compute(host_backend, sequence, 1, (*away, *back)) is None


def test_a_faulty_sequence_fails_alone(backend: ScriptedBackend) -> None:
    good, bad = make_sequence(1, 5, [0, 1]), make_sequence(2, 5, [2, 3])
    bad.num_computed_tokens = 4
    output = backend.step([ScheduledSequence(bad, 1), ScheduledSequence(good, 5)], ())
    assert [one.seq_id for one in output.failed] == [2]
    assert [one.seq_id for one in output.drawn] == [1]


def test_a_step_takes_the_sum_of_its_parts() -> None:
    times = StepTimes(step_ms=10, prefill_token_ms=0.5, sequence_ms=2)
    scheduled = [ScheduledSequence(make_sequence(1, 9, []), 9), ScheduledSequence(make_sequence(2, 9, []), 1)]
    assert times.duration_s(scheduled) == pytest.approx(0.0185)


def test_what_is_remembered_of_a_sequence_goes_with_it(backend: ScriptedBackend) -> None:
    for seq_id in range(20):
        assert compute(backend, make_sequence(seq_id, 3, [0, 1]), 3) is None
    assert len(backend._progress) <= 1
