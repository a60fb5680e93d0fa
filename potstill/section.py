"""The base of every table of the config, and numbers that change with the step."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Unit = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A table of the config: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Ramp(Section):
    """A number that changes with the step: from `start` to `end`, between two optimizer steps counted from 1."""

    start: float
    """Until `from_step`."""
    end: float
    """From `to_step` on."""
    from_step: Annotated[int, Field(ge=1)] = 1
    """Last step at which it is `start`."""
    to_step: Annotated[int, Field(ge=2)] | None = None
    """First step at which it is `end`; from_step + 1 is a switch. None: the run's last step."""

    @model_validator(mode="after")
    def _forwards(self) -> Ramp:
        if self.to_step is not None and self.to_step <= self.from_step:
            raise ValueError(f"a ramp ends after it begins: to_step {self.to_step}, from_step {self.from_step}")
        return self


def at(value: float | Ramp, *, step: int, steps: int) -> float:
    """What a number that may be a ramp is at optimizer step `step` of `steps`."""
    if not isinstance(value, Ramp):
        return value
    last = steps if value.to_step is None else value.to_step
    done = (step - value.from_step) / max(1, last - value.from_step)
    return value.start + (value.end - value.start) * min(1.0, max(0.0, done))


def values(value: float | Ramp) -> tuple[float, float]:
    """The two ends between which it stays."""
    return (value.start, value.end) if isinstance(value, Ramp) else (value, value)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The tables that a field may hold, e.g. both of `dict[str, A] | B`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]
