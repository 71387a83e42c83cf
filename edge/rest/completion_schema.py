"""The body of POST /v1/completions: text that the model goes on from as it is, without a conversation around it."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from edge.rest.chat_schema import StreamOptions
from edge.rest.sampling_schema import Count, StoppedSamplingFields
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import InvalidArgument, Unsupported

MAX_PROMPTS = 16
DEFAULT_MAX_TOKENS = 16  # OpenAI's
Ids = list[Annotated[int, Field(strict=True, ge=0, lt=2**32)]]


def _as_prompts(value: object) -> object:
    """A text, a list of texts, a list of ids, or a list of such lists: always a list of prompts."""
    if value is None:
        return [""]
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        return [value]
    return value


class CompletionRequest(StoppedSamplingFields):
    model: str
    prompt: Annotated[list[str | Ids], BeforeValidator(_as_prompts), Field(min_length=1, max_length=MAX_PROMPTS)] = Field(default=[""])
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    logprobs: Count | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Count | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        """Of one prompt."""
        return self.n or 1

    def to_protos(self, request_id: str) -> list[inference.ChatRequest]:
        """One request for every prompt. Raises the OssiaError of what cannot be done."""
        if self.suffix:
            raise Unsupported("suffix: this model cannot fill a gap; leave it out", "suffix")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise Unsupported("best_of: every choice that is made is returned; leave it out, or ask for as many as n", "best_of")
        return [self._to_proto(request_id, prompt, at) for at, prompt in enumerate(self.prompt)]

    def _to_proto(self, request_id: str, prompt: str | list[int], at: int) -> inference.ChatRequest:
        if prompt == []:
            raise InvalidArgument(f"prompt[{at}]: it is empty; give a text or token ids", "prompt")
        raw = inference.RawPrompt(text=prompt) if isinstance(prompt, str) else inference.RawPrompt(token_ids=prompt)
        request = inference.ChatRequest(
            request_id=request_id,
            model=self.model,
            prompt=raw,
            sampling=sampling.SamplingParams(
                max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens, top_logprobs=self.logprobs
            ),
        )
        request = self.fill(request)
        if request.sampling.HasField("seed"):
            request.sampling.seed = (request.sampling.seed + at * self.num_choices) % 2**64  # sequence i of a request draws with seed + i
        return request
