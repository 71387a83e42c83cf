"""Prompt and completion share the context, to the token."""

import pytest

from edge.conversation.context_fit import fit_max_tokens
from services.errors import ContextLengthExceeded


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "expected"), [(10, None, 50), (60, None, 40), (99, None, 1), (60, 40, 40), (10, 90, 90), (10, 1, 1)]
)
def test_what_fits_is_granted(num_prompt_tokens: int, max_tokens: int | None, expected: int) -> None:
    assert fit_max_tokens(num_prompt_tokens, max_tokens, default_max_tokens=50, max_model_len=100) == expected


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "param"), [(100, None, "messages"), (101, 1, "messages"), (60, 41, "max_tokens")]
)
def test_what_does_not_fit_is_refused_with_the_limit_named(num_prompt_tokens: int, max_tokens: int | None, param: str) -> None:
    with pytest.raises(ContextLengthExceeded, match="100 tokens") as refused:
        fit_max_tokens(num_prompt_tokens, max_tokens, default_max_tokens=50, max_model_len=100)
    assert refused.value.param == param
