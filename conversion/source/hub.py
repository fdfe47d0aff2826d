# SPDX-License-Identifier: Apache-2.0
"""What to do when the Hub does not give what was asked of it: the errors of its library in words of ours."""

from ..errors import brief


LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def hub_says(error: Exception, name: str) -> str:
    """Why the Hub refused something, and what to do.

    Args:
        error: of the Hub's library, or of the HTTP library under it, whose errors have no type in common.
        name: the repository.

    Returns:
        One line.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and keeps everything from the Hub; unset it"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        if get_token() is None:
            return f"it is gated; ask for access on {page}, then {LOG_IN}"
        return f"it is gated, and the account of this token has no access; ask for it on {page}"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model, or it is private; check the name" + ("" if get_token() else f", or {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision; check --revision"
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"it does not know this token; {LOG_IN}"
    if isinstance(error, (HfHubHTTPError, ValueError)):
        return brief(error)
    return f"it cannot be reached ({brief(error) or type(error).__name__})"
