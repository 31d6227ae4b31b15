"""Each kind of run has settings under a key of its own in an adapter's entry."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

from manylora.config.settings import Settings, problem


class OfOneKind(Protocol):
    """An entry is `OfOneKind` of run; see `run_file.AdapterEntry`."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def kind_settings(self) -> "KindSettings": ...


class KindSettings(Settings):
    """What one kind of run asks for; the key that it stands under in an entry tells the kind."""

    LENGTHS: ClassVar[tuple[str, ...]]
    """Its settings that say how long an adapter trains; one of them is given."""
    SOURCES: ClassVar[tuple[str, ...]]
    """Its settings that name data."""

    @classmethod
    def of(cls, entry: OfOneKind) -> Self:
        """Return an entry's settings; raise TypeError if they are not of this kind."""
        settings = entry.kind_settings
        if not isinstance(settings, cls):
            raise TypeError(f"adapter {entry.name!r} is of kind {entry.kind}")
        return settings

    @property
    def length(self) -> tuple[str, int]:
        """The name and the value are those of the setting that says how long an adapter trains."""
        return next(
            (name, value) for name in self.LENGTHS if (value := getattr(self, name)) is not None
        )

    @property
    def known_steps(self) -> int:
        """A run has so many optimizer steps, if that is known before data are read; else 0."""
        name, value = self.length
        return value if name == "max_steps" else 0

    def sources(self) -> dict[str, str]:
        """Return the data that are named, by the setting that names them."""
        named = {name: getattr(self, name) for name in self.SOURCES}
        return {name: source for name, source in named.items() if source is not None}

    def with_sources(self, change: Callable[[str], str]) -> Self:
        """Return these settings with every data source changed."""
        changed = {name: change(source) for name, source in self.sources().items()}
        return self.model_copy(update=changed)

    def code(self) -> tuple[str, ...]:
        """Return the names of somebody's code; most name none."""
        return ()

    def with_code(self, change: Callable[[str], str]) -> Self:
        """Return these settings with every name of somebody's code changed; most name none."""
        return self


def check_one_length(data: Any) -> Any:
    """Return settings with exactly one of the two lengths: one epoch where neither is given."""
    if not isinstance(data, dict):
        return data
    if data.get("epochs") is not None and data.get("max_steps") is not None:
        raise problem("epochs is given too; keep one of them", "max_steps")
    if data.get("epochs") is None and data.get("max_steps") is None:
        return {**data, "epochs": 1}
    return data
