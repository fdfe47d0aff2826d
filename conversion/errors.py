# SPDX-License-Identifier: Apache-2.0
"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """What was given, what is allowed, what to do: one line. The command line prints it and exits with 2."""
