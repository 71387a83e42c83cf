"""From what a caller said to what the scheduler is asked: checks, defaults, prompt, limits. Changes nothing that it is given."""

import asyncio
import datetime
import re
import secrets
import time
from collections.abc import Callable, Iterable

from edge.conversation.choice import ChoiceOptions
from edge.conversation.constraints import build_constraint
from edge.conversation.context_fit import fit_max_tokens
from edge.conversation.conversation_date import ConversationDates
from edge.conversation.harmony_render import HarmonyRenderer, RenderedPrompt, shown_tools, text_of
from edge.conversation.sanitize import sanitize_request
from edge.conversation.turn import PreparedChat
from edge.conversation.validation import check_request
from edge.routing.catalogue import Catalogue
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from protos.ossia.v1 import scheduler_pb2 as scheduler
from services.vocabulary import END_OF_TEXT, Vocabulary

# The line by which gpt-oss's own prompts set the effort.
_EFFORT_LINE = re.compile(r"^[ \t]*reasoning:[ \t]*(low|medium|high)[ \t]*$", re.IGNORECASE | re.MULTILINE)
LONG_REQUEST_BYTES = 16_384
_INSTRUCTING = (inference.ROLE_SYSTEM, inference.ROLE_DEVELOPER)


class ChatPreparer:
    """Holds nothing of any request but when its conversation began. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        catalogue: Catalogue,
        renderer: HarmonyRenderer,
        vocabulary: Vocabulary,
        timeout_s: float,
        sanitizes: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalogue = catalogue
        self._renderer = renderer
        self._vocabulary = vocabulary
        self._timeout_s = timeout_s
        self._sanitizes = sanitizes
        self._clock = clock
        self._dates = ConversationDates()

    async def prepare(self, asked: inference.ChatRequest) -> PreparedChat:
        """Raises the OssiaError that refuses the request."""
        check_request(asked)
        model = self._catalogue.find(asked.model)
        request = self._fill_defaults(asked)
        prompt = await self._make_prompt(request)
        return PreparedChat(
            request_id=request.request_id,
            model=model,
            generate=self._compose(request, model, prompt),
            options=ChoiceOptions(
                stop=tuple(request.stop),
                stop_token_ids=frozenset(request.sampling.stop_token_ids),
                include_reasoning=not request.HasField("include_reasoning") or request.include_reasoning,
                has_tools=bool(shown_tools(request)),
                logprobs=request.sampling.HasField("top_logprobs"),
                is_raw=request.HasField("prompt"),
            ),
            created=int(self._clock()),
        )

    async def render(self, asked: inference.ChatRequest) -> RenderedPrompt:
        """The prompt alone. Raises the OssiaError that refuses the request."""
        check_request(asked)
        return await self._make_prompt(self._fill_defaults(asked))

    async def _make_prompt(self, request: inference.ChatRequest) -> RenderedPrompt:
        """A long one on a thread, so that the streams of others go on meanwhile."""
        if request.ByteSize() > LONG_REQUEST_BYTES:
            return await asyncio.to_thread(self._render, request)
        return self._render(request)

    def _render(self, request: inference.ChatRequest) -> RenderedPrompt:
        if not request.HasField("prompt"):
            return self._renderer.render(request)
        token_ids = [*self._vocabulary.encode(request.prompt.text), *request.prompt.token_ids]
        return RenderedPrompt(token_ids or [END_OF_TEXT], [])  # nothing said: the sign between two documents

    def _fill_defaults(self, asked: inference.ChatRequest) -> inference.ChatRequest:
        request = inference.ChatRequest()
        request.CopyFrom(asked)
        if self._sanitizes or request.sanitize_input:
            sanitize_request(request)
        request.request_id = request.request_id or f"chat-{secrets.token_hex(12)}"
        request.n = request.n or 1
        defaults = self._catalogue.defaults_of(request.model)
        request.reasoning_effort = request.reasoning_effort or read_effort(request.messages) or defaults.effort
        today = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).date()
        request.conversation_date = request.conversation_date or self._dates.find(request, today.isoformat())
        if not request.HasField("timeout_s") or request.timeout_s > self._timeout_s:
            request.timeout_s = self._timeout_s
        params = request.sampling
        if not params.HasField("temperature"):
            params.temperature = defaults.temperature
        if not params.HasField("top_p"):
            params.top_p = defaults.top_p
        if not params.HasField("seed"):
            params.seed = secrets.randbits(63)
        return request

    def _compose(self, request: inference.ChatRequest, model: scheduler.ModelStatus, prompt: RenderedPrompt) -> scheduler.GenerateRequest:
        params = sampling.SamplingParams()
        params.CopyFrom(request.sampling)
        limit = params.max_tokens if params.HasField("max_tokens") else None
        params.max_tokens = fit_max_tokens(
            len(prompt.token_ids), limit, self._catalogue.defaults_of(request.model).max_tokens, model.max_model_len
        )
        if constraint := build_constraint(request):
            params.constraint.CopyFrom(constraint)
        return scheduler.GenerateRequest(
            # A caller may use one id for several requests; below the edge open ids are unique.
            request_id=f"{request.request_id[:111]}-{secrets.token_hex(8)}",
            model=model.model,
            prompt_token_ids=prompt.token_ids,
            sampling=params,
            n=request.n,
            tenant=request.tenant,
            priority=request.priority,
            start_timeout_s=request.start_timeout_s if request.HasField("start_timeout_s") else None,
            timeout_s=request.timeout_s,
            cache_salt=request.cache_salt.encode(),
            checkpoint_positions=prompt.checkpoint_positions,
        )


def read_effort(messages: Iterable[inference.Message]) -> inference.ReasoningEffort.ValueType:
    """What a line "Reasoning: high" in the instructions asks for, the last one; unspecified where there is none."""
    texts = (text_of(message) for message in messages if message.role in _INSTRUCTING)
    asked = [found[1] for text in texts for found in _EFFORT_LINE.finditer(text)]
    return inference.ReasoningEffort.Value(f"REASONING_EFFORT_{asked[-1].upper()}") if asked else inference.REASONING_EFFORT_UNSPECIFIED
