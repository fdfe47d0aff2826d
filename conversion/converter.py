# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint to MLA in closed form.

Two passes over calibration text. The first measures moments (`calibrate.py`), from which every layer's weights follow
(`rotary.py`, `factorize.py`); the second fits the output projections of the converted layers. All other weights are
copied from the source as they are stored.
"""

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import hf_mla
from hf_mla.modeling_mla import MLAAttention

from .calibrate import OutputFit, hooks, measure_moments
from .card import model_card
from .checkpoint import Checkpoint, ShardWriter, check_output, open_checkpoint, output_folder
from .closed_form import convert_attention, mla_config
from .errors import UserError, brief
from .families import FAMILIES, refusal
from .planner import CALIBRATION_WINDOW, DTYPES, PlanReport, choose_size, make_plan, memory_estimate
from .text import read_text, token_windows


logger = logging.getLogger(__name__)

# The code that travels with a checkpoint; tests hold that these are the files that `save_pretrained` copies.
REMOTE_FILES = ("configuration_mla.py", "cache_mla.py", "attention_mla.py", "modeling_mla.py")
CARRIED = [
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
]


@dataclass(frozen=True)
class LayerReport:
    """How well one layer was converted."""

    layer: int
    energy_kept: float
    """Share of the gradient-weighted energy of keys and values that the latent keeps."""
    error_closed_form: float
    """Relative squared error of the attention output on the calibration text."""
    error_reconstructed: float | None = None


@dataclass(frozen=True)
class ConvertReport(PlanReport):
    """The result of `convert`; the field names are the JSON keys."""

    seconds: float = 0.0
    calibration_tokens: int = 0
    weighting: str = ""
    """"gradient", or "local" where the backward pass did not fit in memory."""
    layers: list[LayerReport] = field(default_factory=list)
    output: str = ""


def convert(
    source: str,
    out: str,
    *,
    kv_budget: float | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    calibration: str | None = None,
    calibration_tokens: int = 65536,
    steps: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    overwrite: bool = False,
    push_to: str | None = None,
) -> ConvertReport:
    """Convert a GQA or MHA checkpoint to MLA.

    Args:
        source: a checkpoint folder or a Hub id.
        out: the folder to write; it appears when the conversion is complete.
        kv_budget: share of the original cache to keep, in (0, 1]; or give the two sizes.
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the shared rotary key; an even divisor of the head width.
        calibration: a .txt or .txt.xz file or a data set; None for the bundled English prose.
        calibration_tokens: how many tokens of it to use.
        steps: reconstruction steps; only 0, the closed form, is available.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: type of the output's numbers; "auto" keeps the source's.
        seed: chooses the calibration windows.
        revision: branch, tag or commit of a Hub id.
        overwrite: replace the output folder.
        push_to: a Hub repository to upload the result to.

    Returns:
        What was done, and the error of each layer.

    Raises:
        UserError: something in the arguments or the source does not allow it.
    """
    started = time.perf_counter()
    if steps != 0:
        raise UserError(f"--steps is {steps}; only 0 (the closed form) is available in this version")
    checkpoint = open_checkpoint(source, revision)
    reason = refusal(checkpoint.config)
    if reason is not None:
        raise UserError(f"{source}: {reason}")
    rank, rope_dim = choose_size(checkpoint.config, kv_budget, kv_lora_rank, qk_rope_head_dim)
    planned = make_plan(checkpoint, rank, rope_dim, dtype)
    assert planned.bytes_written is not None and checkpoint.folder is not None
    path = check_output(out, checkpoint.folder, planned.bytes_written, overwrite=overwrite)
    if push_to is not None:
        check_repository(push_to)
    run_device = choose_device(device)
    windows = calibration_windows(checkpoint, calibration, calibration_tokens, seed)
    compute = torch.float64 if checkpoint.dtype == "F64" else torch.float32
    backward = fits_backward(checkpoint, run_device, windows.shape[1])
    model = load_model(checkpoint, run_device, compute)
    model.requires_grad_(False)
    batch = 8 if run_device.type == "cuda" else 1
    moments = measure_moments(model, windows, batch, backward=backward)
    if not all(torch.isfinite(x).all() for moment in moments for x in (moment.inputs, moment.keys, moment.values)):
        raise UserError(f"{source} computes numbers that are not finite; its weights are damaged")

    stored = next(name for name, header in DTYPES.items() if header == checkpoint.dtype) if dtype == "auto" else dtype
    config = mla_config(checkpoint.config, rank, rope_dim, stored)
    config._attn_implementation = model.config._attn_implementation
    converted, energies = [], []
    for layer, moment in zip(tqdm(model.model.layers, desc="factorizing", unit="layer"), moments, strict=True):
        attention, energy = convert_attention(layer.self_attn, moment, config)
        converted.append(attention)
        energies.append(energy)
    errors = fit_outputs(model, converted, windows, batch)
    layers = [LayerReport(i, *pair) for i, pair in enumerate(zip(energies, errors, strict=True))]

    report = ConvertReport(
        **{key: getattr(planned, key) for key in PlanReport.__dataclass_fields__},
        seconds=time.perf_counter() - started,
        calibration_tokens=windows.numel(),
        weighting="gradient" if backward else "local",
        layers=layers,
        output=str(path),
    )
    recipe = {
        "source": source,
        "revision": revision,
        "calibration": calibration or "bundled English prose",
        "seed": seed,
        "steps": steps,
        "dtype": dtype,
        "hf_mla": hf_mla.__version__,
    }
    with output_folder(path) as folder:
        write_checkpoint(folder, checkpoint, config, converted, report, recipe)
    if push_to is not None:
        upload(path, push_to)
    return report


def calibration_windows(checkpoint: Checkpoint, calibration: str | None, tokens: int, seed: int) -> Tensor:
    """Calibration token ids [windows, tokens], drawn from the text with the seed."""
    if tokens < 2:
        raise UserError(f"--calibration-tokens is {tokens}; at least 2 are needed, 65536 are usual")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; allowed: 0 to 2**63 - 1")
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.name)
    text = read_text(calibration, tokens, spread=4)
    window = min(CALIBRATION_WINDOW, checkpoint.config.max_position_embeddings)
    windows = token_windows(text, tokenizer, tokens, window, seed)
    check_vocabulary(windows, checkpoint)
    return windows


def check_vocabulary(windows: Tensor, checkpoint: Checkpoint) -> None:
    """Raise a UserError if the tokenizer knows more tokens than the model."""
    highest, known = int(windows.max()), checkpoint.config.vocab_size
    if highest >= known:
        raise UserError(f"the tokenizer of {checkpoint.name} gives token {highest}, the model knows {known}; it is another model's")


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: Any) -> Any:
    """A causal language model in evaluation mode, with every weight from the checkpoint and none left over.

    Args:
        checkpoint: what to load; on disk.
        device: where to put it.
        dtype: what to compute in; "auto" for what is stored.

    Returns:
        The model.

    Raises:
        UserError: weights are missing, left over or of the wrong shape, or the configuration is not one of a working model.
    """
    from transformers import AutoModelForCausalLM

    assert checkpoint.folder is not None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # any type: what a configuration can break is up to the library
        raise UserError(f"{checkpoint.name} cannot be loaded: {brief(error)}") from error
    model, loading = loaded
    for kind, what in (("missing_keys", "does not hold"), ("unexpected_keys", "holds, beyond what its config.json describes,")):
        names = sorted(name for name in loading[kind] if not name.endswith("inv_freq"))
        if names:
            raise UserError(f"{checkpoint.name} {what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    return model.to(device).eval()


def load_tokenizer(folder: Path | None, name: str) -> Any:
    """The tokenizer of a checkpoint, or a UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # many types for many damages; all of them mean that there is no usable tokenizer
        raise UserError(f"{name} has no usable tokenizer ({brief(error)}); copy tokenizer files there") from None


def choose_device(device: str) -> torch.device:
    """Resolve "auto", and refuse a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not available; use auto, cpu, cuda or cuda:N")
    return chosen


def fits_backward(checkpoint: Checkpoint, device: torch.device, window: int) -> bool:
    """Whether the backward pass fits in memory; says so if it does not, and refuses if not even the forward pass does."""
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        available = psutil.virtual_memory().available
    batch_window = window * (8 if device.type == "cuda" else 1)
    if memory_estimate(checkpoint, backward=True, window=batch_window) <= available:
        return True
    needed = memory_estimate(checkpoint, backward=False, window=batch_window)
    if needed > available:
        raise UserError(
            f"converting {checkpoint.name} takes about {needed / 1e9:.1f} GB on {device}, {available / 1e9:.1f} GB are free; "
            "use another --device or machine"
        )
    logger.warning(
        "a backward pass does not fit in memory: keys are weighted by the layer's queries and values by its output "
        "projection, not by the loss gradient; expect a somewhat higher perplexity"
    )
    return False


@torch.no_grad()
def fit_outputs(model: Any, converted: list[MLAAttention], windows: Tensor, batch: int) -> list[float]:
    """Fit each converted layer's `o_proj` to the original layer, on the original model's inputs.

    Args:
        model: the original model.
        converted: its converted layers; their `o_proj` is changed in place.
        windows: token ids [windows, tokens].
        batch: windows per pass.

    Returns:
        The relative squared error of each layer's attention output after the fit.
    """
    rotary = type(model.model.rotary_emb)(converted[0].config).to(model.device)
    fits = [OutputFit(mla.o_proj.weight) for mla in converted]
    captured: dict[int, Tensor] = {}

    def watch_heads(_module: nn.Module, args: tuple, layer: int) -> None:
        captured[layer] = args[0]

    def watch_original(_module: nn.Module, args: tuple, kwargs: dict, output: tuple, layer: int) -> None:
        inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        positions = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)
        converted[layer](inputs, rotary(inputs, positions), kwargs.get("attention_mask"))
        fits[layer].add(captured.pop(layer), output[0])

    handles = []
    for layer, (original, mla) in enumerate(zip(model.model.layers, converted, strict=True)):
        handles.append(mla.o_proj.register_forward_pre_hook(lambda m, a, i=layer: watch_heads(m, a, i)))
        handles.append(
            original.self_attn.register_forward_hook(lambda m, a, k, o, i=layer: watch_original(m, a, k, o, i), with_kwargs=True)
        )
    with hooks(handles):
        for ids in tqdm(windows.split(batch), desc="fitting outputs", unit="batch"):
            model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    errors = []
    for fit, mla in zip(fits, converted, strict=True):
        weight, error = fit.solve()
        mla.o_proj.weight.copy_(weight)
        errors.append(error)
    return errors


def write_checkpoint(
    folder: Path, source: Checkpoint, config: Any, converted: list[MLAAttention], report: ConvertReport, recipe: dict
) -> None:
    """Write weights, configuration, code, tokenizer, card and report of a converted model into `folder`."""
    assert source.folder is not None
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
    prefix = FAMILIES[source.config.model_type].attention
    attention = tuple(prefix.format(layer=layer) for layer in range(len(converted)))
    writer = ShardWriter(folder)
    for name, tensor in source.read():
        if not name.startswith(attention):
            writer.add(name, tensor if recipe["dtype"] == "auto" else tensor.to(dtype))
    for place, mla in zip(attention, converted, strict=True):
        for name, tensor in mla.state_dict().items():
            # The identity norm's weight is beyond float16; it stays float32 there, as the model loads it.
            wide = dtype == torch.float16 and name.startswith("kv_a_layernorm")
            writer.add(place + name, tensor.to(torch.float32 if wide else dtype))
    writer.finish()

    for pattern in CARRIED:
        for carried in source.folder.glob(pattern):
            shutil.copy(carried, folder / carried.name)
    package = Path(hf_mla.__file__).parent
    for file in REMOTE_FILES:
        shutil.copy(package / file, folder / file)
    config.save_pretrained(folder)
    (folder / "conversion.json").write_text(
        json.dumps({"recipe": recipe, "report": asdict(report)}, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "README.md").write_text(model_card(source, config, report, recipe), encoding="utf-8")


def check_repository(repository: str) -> None:
    """Raise a UserError unless this can be the name of a Hub repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push-to {repository}: {brief(error)}") from None


def upload(folder: Path, repository: str) -> None:
    """Upload a finished output folder to a Hub repository, which is made (private) if it does not exist."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Converted to MLA with hf_mla")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise UserError(f"{folder} is complete, but uploading it to {repository} failed: {brief(error)}") from None
