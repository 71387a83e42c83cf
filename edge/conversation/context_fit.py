"""Whether prompt and completion fit the model's context."""

from services.errors import ContextLengthExceeded


def fit_max_tokens(num_prompt_tokens: int, max_tokens: int | None, default_max_tokens: int, max_model_len: int) -> int:
    """The completion's limit in tokens: what was asked for, else the default, cut to the room that is left.

    Raises ContextLengthExceeded where the prompt leaves no room, or less than was asked for.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"messages: they are {num_prompt_tokens} tokens and the model's context is {max_model_len} tokens, completion included; "
            "shorten them",
            "messages",
        )
    if max_tokens is None:
        return min(default_max_tokens, room)
    if max_tokens > room:
        raise ContextLengthExceeded(
            f"max_tokens: the prompt's {num_prompt_tokens} tokens and {max_tokens} more exceed the model's context of {max_model_len} "
            f"tokens; ask for at most {room}",
            "max_tokens",
        )
    return max_tokens
