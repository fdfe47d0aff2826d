# SPDX-License-Identifier: Apache-2.0
"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """What was given, what is allowed, what to do: one line. The command line prints it and exits with 2."""


def brief(error: object, length: int = 160) -> str:
    """The message of a library's error on one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else text[: length - 3] + "..."
