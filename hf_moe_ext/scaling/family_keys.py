"""Keys of one family's configuration: given, or the family's default, or one error that names the family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FamilyKeys:
    """Looks keys up.

    Attributes:
        family: ``model_type``.
        given: what the configuration says.
        defaults: of the keys that a count needs and the family's class has a default for.
    """

    family: str
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def knows(self, name: str) -> bool:
        """Whether the family has such a key."""
        return name in self.given or name in self.defaults

    def value(self, *names: str) -> Any:
        """The first of these names that is given, else a default.

        Raises:
            ValueError: neither.
        """
        for source in (self.given, self.defaults):
            for name in names:
                if name in source:
                    return source[name]
        raise ValueError(
            f"{self.family} configuration: {' or '.join(names)} is missing and has no default; write it into config.json"
        )

    def count(self, *names: str) -> int:
        """A whole number of at least 1."""
        number = self.number(*names)
        if number < 1:
            raise ValueError(f"{self.family} configuration: {names[0]} must be at least 1, got {number}")
        return number

    def optional_count(self, name: str) -> int | None:
        """The same, or None."""
        return None if self.value(name) is None else self.count(name)

    def number(self, *names: str) -> int:
        """A whole number of at least 0."""
        number = self.value(*names)
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{self.family} configuration: {names[0]} must be a whole number, got {number!r}")
        if number < 0:
            raise ValueError(f"{self.family} configuration: {names[0]} must be at least 0, got {number}")
        return number

    def switch(self, name: str) -> bool:
        """True or false."""
        value = self.value(name)
        if not isinstance(value, bool):
            raise ValueError(f"{self.family} configuration: {name} must be true or false, got {value!r}")
        return value
