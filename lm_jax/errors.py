"""Mistakes that the user can mend.

Whatever derives from `UserError` is shown as its message alone (no traceback) by every launcher, with exit status 2.
Anything else is a fault of this project and keeps its traceback.
"""


class UserError(Exception):
    """Something that the user asked for cannot be had. The message says what, which value, and what would be right."""


class ConfigError(UserError):
    """A key of the config has a value that cannot be used."""

    def __init__(self, key: str, problem: str, remedy: str = "") -> None:
        """Args: the dotted key (`optimizer.learning_rate`), what is wrong with which value, what would be right."""
        self.key = key
        super().__init__(f"{key}: {problem}" + (f"\n{remedy}" if remedy else ""))
