"""ossia-nano, the demonstration model that comes with Ossia: served where nothing else is named, or by its name."""

from collections.abc import Sequence
from pathlib import Path

from models.nano.cache import NANO_NAME, expanded_model
from services.config import ConfigError, load_config
from services.process import announce_progress
from worker.config import WorkerConfig


def title(model: str) -> str:
    """A model's name for people, who must not take the demonstration for one of OpenAI's."""
    return f"{model}, a small demonstration model" if model == NANO_NAME else model


def is_nano(model: Path | None) -> bool:
    """Whether `ossia up` was asked for it: by nothing, or by its name where no such folder is."""
    return model is None or (str(model) == NANO_NAME and not model.exists())


def nano_flags(argv: Sequence[str]) -> list[str]:
    """What `ossia worker` adds where it is asked for the model by name and for no folder. Raises StartError."""
    try:
        config = load_config(WorkerConfig, argv)
    except ConfigError:
        return []  # the worker itself says what is wrong
    if config.backend != "model" or config.model != NANO_NAME or config.model_dir is not None:
        return []
    return ["--model-dir", str(expanded_model(tell=announce_progress))]
