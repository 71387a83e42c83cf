"""Fields that every create call shares: how to sample, when to stop, and how to treat the request. Types here, bounds behind both doors."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling

Int = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# The model knows three; what is beyond them on either side is the nearest.
EFFORTS = {
    "none": inference.REASONING_EFFORT_LOW,
    "minimal": inference.REASONING_EFFORT_LOW,
    "low": inference.REASONING_EFFORT_LOW,
    "medium": inference.REASONING_EFFORT_MEDIUM,
    "high": inference.REASONING_EFFORT_HIGH,
    "xhigh": inference.REASONING_EFFORT_HIGH,
    "max": inference.REASONING_EFFORT_HIGH,
    None: inference.REASONING_EFFORT_UNSPECIFIED,
}


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Loose(BaseModel):
    """Fields that nobody knows are accepted and ignored."""

    model_config = ConfigDict(extra="ignore")


class SamplingFields(Loose):
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    # Beyond OpenAI's, with the names that other servers use.
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: str | None = None
    timeout_s: float | None = None
    start_timeout_s: float | None = None
    sanitize_input: bool | None = None
    include_reasoning: bool | None = None
    conversation_date: str | None = None

    def fill(self, request: inference.ChatRequest) -> inference.ChatRequest:
        """Puts these fields into `request`, and returns it."""
        request.priority = self.priority or 0
        for name in ("timeout_s", "start_timeout_s", "include_reasoning"):
            if (value := getattr(self, name)) is not None:
                setattr(request, name, value)
        request.cache_salt = self.cache_salt or ""
        request.user = self.user or ""
        request.metadata.update(self.metadata or {})
        request.sanitize_input = self.sanitize_input or False
        request.conversation_date = self.conversation_date or ""
        request.sampling.MergeFrom(self._convert())
        return request

    def _convert(self) -> sampling.SamplingParams:
        return sampling.SamplingParams(
            min_tokens=self.min_tokens or 0,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0,
            repetition_penalty=self.repetition_penalty,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos or False,
        )


class StoppedSamplingFields(SamplingFields):
    """What chat and text completions have and responses do not."""

    stream: Annotated[bool, Field(strict=True)] | None = None
    n: Count | None = None
    seed: Int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None

    def fill(self, request: inference.ChatRequest) -> inference.ChatRequest:
        request.n = self.n or 0
        request.stop.extend(self.stop or ())
        return super().fill(request)

    def _convert(self) -> sampling.SamplingParams:
        params = super()._convert()
        if self.seed is not None:
            params.seed = self.seed % 2**64  # clients may send negative ones
        params.presence_penalty = self.presence_penalty or 0
        params.frequency_penalty = self.frequency_penalty or 0
        params.logit_bias.update(self.logit_bias or {})
        return params
