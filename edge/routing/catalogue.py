"""Which models can be asked for now, as the connected schedulers tell it, and what the operator set for each."""

import time
from collections.abc import Callable, Mapping

from edge.routing.model_settings import Defaults, ModelSettings
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import scheduler_pb2 as scheduler
from services.errors import MissingField, ModelNotFound, Unavailable

OWNER = "ossia"
RETRY_AFTER_S = 1.0  # a scheduler or a group that was lost is back, or replaced, after about so long


class Catalogue:
    """The latest status of every connected scheduler, and when each model was first seen. `clock` gives seconds since the epoch."""

    def __init__(self, settings: Mapping[str, ModelSettings] | None = None, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings or {"": ModelSettings()}  # by model; "" for those not named
        self._aliases = {alias: name for name, entry in self._settings.items() for alias in entry.aliases}
        self._clock = clock
        self._statuses: dict[str, scheduler.SchedulerStatus] = {}  # by the scheduler's address; its stream keeps them up to date
        self._first_seen: dict[str, int] = {}  # model to seconds since the epoch

    def observe(self, address: str, status: scheduler.SchedulerStatus | None) -> None:
        """A scheduler spoke, or (None) its connection is gone."""
        if status is None:
            self._statuses.pop(address, None)
            return
        self._statuses[address] = status
        for model in status.models:
            self._first_seen.setdefault(model.model, int(self._clock()))

    @property
    def has_seen_models(self) -> bool:
        return bool(self._first_seen)

    def find(self, name: str) -> scheduler.ModelStatus:
        """The model as all schedulers together serve it. Raises MissingField, ModelNotFound, or Unavailable for one that is away."""
        if not name:
            raise MissingField("model: give the name of a model, as GET /v1/models lists them", "model")
        name = self._aliases.get(name, name)
        models = self._merge()
        if name in models and models[name].num_groups:
            return models[name]
        if name in self._first_seen or not self._first_seen:
            raise Unavailable(f"no worker group serves the model {name!r} now; try again", "model", RETRY_AFTER_S)
        known = ", ".join(sorted(self._first_seen))
        raise ModelNotFound(f"model: there is no model {name!r}; choose one of: {known}", "model")

    @property
    def first_model(self) -> str:
        """For dialects that name no model: the first that is served, by name. Empty where there is none."""
        return next((card.id for card in self.list_models() if card.num_groups), "")

    def settings_of(self, model: str) -> ModelSettings:
        return self._settings.get(self._aliases.get(model, model), self._settings[""])

    def defaults_of(self, model: str) -> Defaults:
        return self.settings_of(model).defaults

    def find_card(self, name: str) -> inference.ModelCard:
        """One of `list_models`, by its name or an alias. Raises ModelNotFound."""
        cards = {card.id: card for card in self.list_models()}
        if card := cards.get(self._aliases.get(name, name)):
            return card
        raise ModelNotFound(f"model: there is no model {name!r}; choose one of: {', '.join(cards) or 'none at present'}", "model")

    def list_models(self) -> list[inference.ModelCard]:
        """Every model that a connected scheduler names, by name."""
        return [
            inference.ModelCard(
                id=name,
                created=self._first_seen.get(name, 0),
                owned_by=OWNER,
                max_model_len=model.max_model_len,
                architecture=model.architecture,
                total_parameters=model.total_parameters,
                active_parameters=model.active_parameters,
                num_groups=model.num_groups,
            )
            for name, model in sorted(self._merge().items())
        ]

    @property
    def num_absent(self) -> int:
        """Models seen before that no group serves now."""
        models = self._merge()
        return sum(name not in models or not models[name].num_groups for name in self._first_seen)

    def _merge(self) -> dict[str, scheduler.ModelStatus]:
        merged: dict[str, scheduler.ModelStatus] = {}
        for status in self._statuses.values():
            for model in status.models:
                if before := merged.get(model.model):
                    before.num_groups += model.num_groups
                    before.max_model_len = min(before.max_model_len, model.max_model_len)
                else:
                    merged[model.model] = scheduler.ModelStatus()
                    merged[model.model].CopyFrom(model)
        return merged
