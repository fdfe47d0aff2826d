# SPDX-License-Identifier: Apache-2.0
"""Upload a converted checkpoint to the Hub (`convert --push-to`).

The upload comes last, when the checkpoint has its place. If it is cut short, the same command finds what it has converted and goes
on with the upload; what the Hub has already is not sent again: of large files it knows the SHA-256, or with `hf_xet` the chunks.
"""

import json
import logging
from pathlib import Path
from typing import Any

from ..errors import UserError, brief
from ..source.checkpoint import read_record, user_path
from ..source.hub import LOG_IN, hub_says
from .folder import BACKUP, MARK, NO_CONTENT
from .reports import ConvertReport, from_json


logger = logging.getLogger(__name__)


def make_repository(repository: str) -> str:
    """Make a Hub repository, private, if it does not exist, so that it is known before the work whether that can be.

    Args:
        repository: as the user gave it.

    Returns:
        Its name with its owner.

    Raises:
        UserError: there is no token, it may not write there, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise UserError(f"--push-to {repository}: there is no token for the Hub; {LOG_IN} to one that may write")
    try:
        return HfApi().create_repo(repository, private=True, exist_ok=True).repo_id
    except Exception as error:  # of the HTTP library's too, which depends on the version of the Hub's
        forbidden = isinstance(error, HfHubHTTPError) and error.response.status_code == 403
        said = "this token may not write there; use one that may" if forbidden else hub_says(error, repository)
        raise UserError(f"--push-to {repository}: {said}") from None


def push(folder: Path, repository: str) -> None:
    """Upload a finished output folder to a Hub repository, or raise a UserError that says how to go on."""
    from huggingface_hub import HfApi

    ignored = [".*", f"{BACKUP}*", *(f"{name}/*" for name in NO_CONTENT)]
    try:
        HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Converted to MLA with hf_mla", ignore_patterns=ignored
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--overwrite") from None  # without it, the command goes on with the upload
    except Exception as error:  # of any of the libraries under the Hub's
        reason = f"{error} ({error.__cause__})" if type(error) is RuntimeError else error  # the former says which file it was
        raise UserError(
            f"{folder} is complete, but uploading it to {repository} failed ({brief(reason)}); "
            "the same command, without --overwrite, goes on with the upload"
        ) from None


def converted_before(out: str, asked: dict[str, Any]) -> ConvertReport | None:
    """What the same command reported that wrote an output, if one did.

    Args:
        out: the output folder, as the user gave it.
        asked: arguments, as the record has them under this name.

    Returns:
        The report; None if something else lies there, or nothing.
    """
    path = user_path(out)
    record = read_record(path)
    changed = "healing" in record or "export" in record or not (path / MARK).is_file()
    if changed or record.get("recipe", {}).get("asked") != json.loads(json.dumps(asked)):
        return None
    logger.warning("%s was converted by this command before: it is uploaded as it is", out)
    return from_json(ConvertReport, record["report"])
