"""Streams one answer over gRPC: `python examples/python/grpc_chat.py 127.0.0.1:9000 ossia-nano "question"`."""

import asyncio
import sys

from clients.python import ChatError, InferenceClient
from protos.ossia.v1 import inference_pb2 as inference


async def main(address: str, model: str, question: str) -> int:
    message = inference.Message(role=inference.ROLE_USER, content=[inference.ContentPart(text=question)])
    request = inference.ChatRequest(model=model, messages=[message], reasoning_effort=inference.REASONING_EFFORT_LOW)
    async with InferenceClient(address, timeout_s=60) as client:
        try:
            async for event in client.chat(request):
                if event.channel_delta.channel == inference.CHANNEL_FINAL:
                    print(event.channel_delta.text, end="", flush=True)
        except ChatError as error:
            print(error.message, file=sys.stderr)
            return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:4])))
