"""Who shares the batch does not matter: every stream gets its solo output, on one group and on two."""

import asyncio
import random

import grpc

from protos.ossia.v1 import inference_pb2 as pb
from protos.ossia.v1.inference_pb2_grpc import InferenceStub
from tests.cluster.local_cluster import SETTLE_TIMEOUT_S, LocalCluster, wait_until

NUM_STREAMS = 32


def make_request(number: int) -> pb.ChatRequest:
    """Prompts from a few to some hundred tokens, past the window of 128; answers of 5 to 60."""
    draw = random.Random(number)
    words = " ".join(draw.choice(["tree", "river", "stone", "cloud", "ember"]) for _ in range(draw.randint(1, 300)))
    request = pb.ChatRequest(model="random", messages=[pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text=words)])])
    request.sampling.temperature = 0.0
    request.sampling.max_tokens = draw.randint(5, 60)
    request.sampling.ignore_eos = True
    return request


async def token_ids(stub: InferenceStub, number: int, delay_s: float = 0.0) -> list[int]:
    await asyncio.sleep(delay_s)
    events = [event async for event in stub.Chat(make_request(number), timeout=300)]
    assert events[-1].HasField("completed"), events[-1]
    return [one for event in events if event.HasField("choice_finished") for one in event.choice_finished.token_ids]


async def test_32_streams_that_come_and_go_get_their_solo_tokens(model: LocalCluster) -> None:
    async with grpc.aio.insecure_channel(model.grpc) as channel:
        stub = InferenceStub(channel)
        solo = [await token_ids(stub, number) for number in range(NUM_STREAMS)]
        draw = random.Random(5)
        together = await asyncio.gather(*(token_ids(stub, number, draw.uniform(0, 2)) for number in range(NUM_STREAMS)))
    assert together == solo
    assert all(len(ids) == make_request(number).sampling.max_tokens for number, ids in enumerate(solo))
    assert len({tuple(ids) for ids in solo}) == NUM_STREAMS, "different prompts give different answers, or equality would mean nothing"
    wait_until(model.is_idle, SETTLE_TIMEOUT_S, "every block is free again")
    assert all(group.num_steps > 0 for group in model.status().groups), "every group took a part"
