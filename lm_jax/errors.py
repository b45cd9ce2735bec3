"""Errors that speak to the user.

Launchers show these as their message alone, without a traceback: a `UserError` with exit status 2, a `Failure` with
exit status 1. Anything else is a fault of this project and keeps its traceback.
"""


class UserError(Exception):
    """Something that the user asked for cannot be had. The message says what, which value, and what would be right."""


class ConfigError(UserError):
    """A key of the config has a value that cannot be used."""

    def __init__(self, key: str, problem: str, remedy: str = "") -> None:
        """Args: the dotted key (`optimizer.learning_rate`), what is wrong with which value, what would be right."""
        self.key = key
        super().__init__(f"{key}: {problem}" + (f"\n{remedy}" if remedy else ""))


class Failure(Exception):
    """What was asked for is possible, and could not be done: a full disk, a loss that is not finite. The message says
    why."""
