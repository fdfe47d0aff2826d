# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is."""

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..output.plotting import check_plot, plot_conversion
from ..source.checkpoint import RECORD, Checkpoint, open_checkpoint
from ..source.families import kv_heads, refusal, source_head_dim
from ..source.hub import hub_says
from ..source.matching import match_model
from ..source.shards import TensorHeader


DIMENSIONS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
GQA_DIMENSIONS = ("num_key_value_heads", "head_dim")
MLA_DIMENSIONS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


def info(source: str, *, revision: str | None = None, plot: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint, converted or not, from its configuration and safetensors headers.

    Args:
        source: a checkpoint folder, a .gguf file or a Hub id.
        revision: branch, tag or commit of a Hub id.
        plot: a .png, .svg or .pdf file to draw the spectra and errors of a conversion to; needs matplotlib.

    Returns:
        Model type, dimensions, parameters, bytes, and what the KV cache takes; for a converted one, also the version of
        hf_mla that wrote it; for others, whether and why not it can be converted.

    Raises:
        UserError: it is not a whole checkpoint, or cannot be drawn.
    """
    if plot is not None:
        check_plot(plot)
    checkpoint = open_checkpoint(source, revision, headers_only=True)
    config = checkpoint.config
    if not hasattr(config, "num_hidden_layers"):
        raise UserError(f"{source}: {refusal(config)}")
    converted = config.model_type.endswith("_mla")
    result: dict[str, Any] = {"model_type": config.model_type, "converted": converted}
    for name in DIMENSIONS + (MLA_DIMENSIONS if converted else GQA_DIMENSIONS):
        result[name] = getattr(config, name, None)
    result["parameters"] = checkpoint.parameters
    result["dtype"] = checkpoint.dtype
    result["bytes"] = checkpoint.bytes
    if converted:
        floats = config.kv_floats_per_token_per_layer
        result["hf_mla_version"] = config.hf_mla_version
    else:
        reason = refusal(config) or mismatch(checkpoint)
        result["supported"], result["reason"] = reason is None, reason
        if reason is None:
            result["head_dim"] = source_head_dim(config)
        floats = 2 * kv_heads(config) * result["head_dim"] if reason is None else None
    result["kv_floats_per_token_per_layer"] = floats
    if floats is not None:
        result["kv_bytes_per_token"] = config.num_hidden_layers * TensorHeader((floats,), checkpoint.dtype).bytes
    if plot is not None:
        if not converted:
            raise UserError(f"{source} is a {config.model_type!r}, not a converted model; --plot draws what a conversion measured")
        plot_conversion(conversion_file(checkpoint, revision), source, plot)
    return result


def mismatch(checkpoint: Checkpoint) -> str | None:
    """Why the tensors of a checkpoint of a supported family are not those of its model, or None if they are."""
    try:
        match_model(checkpoint)
    except UserError as error:
        return str(error)
    return None


def conversion_file(checkpoint: Checkpoint, revision: str | None) -> Path:
    """Where the conversion.json of a converted checkpoint lies; of a Hub checkpoint it is fetched."""
    if checkpoint.folder is not None:
        return checkpoint.folder / RECORD
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(checkpoint.name, RECORD, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"{checkpoint.name} has no {RECORD} that can be fetched: {hub_says(error, checkpoint.name)}") from None
