import pytest

from edge.conversation.choice import ChoiceOptions
from edge.conversation.turn import PreparedChat, Turn
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from protos.ossia.v1 import scheduler_pb2 as scheduler
from services.errors import GroupLost
from services.vocabulary import load_vocabulary

LOST = sampling.Error(code=sampling.ERROR_CODE_GROUP_LOST, message="gone")


def test_what_comes_together_with_an_error_is_said_before_it() -> None:
    vocabulary = load_vocabulary()
    turn = Turn(PreparedChat("r", scheduler.ModelStatus(), scheduler.GenerateRequest(), ChoiceOptions(), created=0), vocabulary)
    said = vocabulary.encode_harmony("<|channel|>final<|message|>Hello there")
    ended = scheduler.Finished(reason=sampling.FINISH_REASON_ERROR, error=LOST)
    events: list[inference.ChatEvent] = []
    with pytest.raises(GroupLost, match="gone"):
        for event in turn.apply([scheduler.TokenDelta(token_ids=said, finished=ended)]):
            events.append(event)  # noqa: PERF402 - what came before the error counts
    assert "".join(event.channel_delta.text for event in events) == "Hello there"
