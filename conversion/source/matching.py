# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint make those of the library's model.

That is for the library to say, not for this project: how names are mapped (with or without the decoder's prefix, older spellings,
tensors stored in pieces), which weights are tied, and what is ignored. A matched checkpoint goes by the model's names from there
on, in the plan and in the layers that are read. So does the output, but for what the library renames or puts together as it loads
a family, such as experts: that is written as it was stored, for the library to do the same again.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError, brief
from .checkpoint import Checkpoint
from .families import FAMILIES, caps_scores
from .shards import ITEMSIZE


if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """What a tensor is made of, or one piece of it."""

    name: str
    """In the files."""
    pattern: str | None
    """Of the library's converter that takes it, if one does."""
    written: str | None
    """Its name in an output, if that is not the model's."""


Parts = list[Part]


@dataclass(frozen=True, kw_only=True)
class ModelCheckpoint(Checkpoint):
    """A checkpoint whose `tensors` are those of the library's model, by their names there, and no others.

    A weight that is tied to another is among them only if it is stored as well; `load` knows it in any case.
    """

    stored: Checkpoint
    """As the files have it."""
    model: Any
    """The library's model, empty."""
    parts: dict[str, Parts]
    """By name in the model."""
    converters: dict[str, Any]
    """The library's converters by pattern."""

    @property
    def paths(self) -> dict[str, Path]:
        """As the files are named."""
        return self.stored.paths

    @property
    def written(self) -> dict[str, str]:
        """What an output holds of this: by the names there, the names in the files."""
        return {part.written or name: part.name for name in self.tensors for part in self.parts[name]}

    @property
    def kept(self) -> dict[str, str]:
        """What of this conversion leaves as it is, which is all outside of the attention; see `written`."""
        layers = range(self.config.num_hidden_layers)
        attention = tuple(FAMILIES[self.config.model_type].attention.format(layer=layer) for layer in layers)
        return {name: part for name, part in self.written.items() if not name.startswith(attention)}

    def load(self, names: list[str], device: Any, dtype: Any = None) -> "dict[str, Tensor]":
        """Read some tensors, or put them together; see `Checkpoint.load`."""
        whole = {name: self.parts[name][0].name for name in names if self.parts[name][0].pattern is None}
        read = self.stored.load(list(whole.values()), device, dtype)
        made = {name: self.assemble(name, device, dtype) for name in names if name not in whole}
        return made | {name: read[part] for name, part in whole.items()}

    def assemble(self, name: str, device: Any, dtype: Any) -> "Tensor":
        """Put a tensor together; of experts, one after the other, so that the pieces of one at a time are in memory beside it."""
        parts = self.parts[name]
        if not stacks(self.converters[str(parts[0].pattern)]):
            return self.convert(name, parts, device, dtype)
        pieces: dict[str | None, Parts] = {}
        for part in parts:
            pieces.setdefault(part.pattern, []).append(part)
        first, *others = zip(*pieces.values(), strict=True)
        expert = self.convert(name, list(first), device, dtype)
        whole = expert.new_empty(1 + len(others), *expert.shape[1:])
        whole[0] = expert[0]
        for row, group in zip(whole[1:], others, strict=True):
            row.copy_(self.convert(name, list(group), device, dtype)[0])
        return whole

    def convert(self, name: str, parts: Parts, device: Any, dtype: Any) -> "Tensor":
        """Have the library make a tensor of pieces."""
        converter = copy.deepcopy(self.converters[str(parts[0].pattern)])
        read = self.stored.load([part.name for part in parts], device, dtype)
        for part in parts:
            converter.add_tensor(name, part.name, part.pattern, read.pop(part.name))
        made = converter.convert(name, model=self.model, config=self.config)[name]
        return made[0] if isinstance(made, list) else made


def stacks(converter: Any) -> bool:
    """Whether a converter of the library makes each slice of the first dimension of one piece of each kind: an expert."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *others = converter.operations
    return isinstance(first, MergeModulelist) and first.dim == 0 and all(isinstance(o, Concatenate) and o.dim > 0 for o in others)


def empty_model(checkpoint: Checkpoint, dtype: Any = None) -> Any:
    """The library's own model for a checkpoint, with meta tensors for weights; buffers that are computed have their values."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(checkpoint.config)]
        attention = "sdpa" if kind._supports_sdpa and not caps_scores(checkpoint.config) else "eager"
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(checkpoint.config), dtype=dtype, attn_implementation=attention, **experts_option(dtype)
            )
    except Exception as error:  # any type: what a configuration can break is up to the library
        raise UserError(f"{checkpoint.name} cannot be loaded: {brief(error)}") from error
    return model.eval().requires_grad_(False)


def experts_option(dtype: Any) -> dict[str, str]:
    """How the library computes experts in a type, as an option of its own: by its fastest way, which has no float64, or eagerly."""
    return {"experts_implementation": "eager"} if str(dtype) in ("torch.float64", "float64") else {}


def match_model(checkpoint: Checkpoint) -> ModelCheckpoint:
    """Match a checkpoint's tensors with the library's model, by their headers.

    Args:
        checkpoint: of a supported family or converted; one that is matched already is returned as it is.

    Returns:
        The checkpoint by the model's names. If its configuration ties two weights that are stored and differ, it is one that
        does not tie them, for neither does the library. (On disk only: headers do not show it.)

    Raises:
        UserError: the tensors are not just those of the model.
    """
    if isinstance(checkpoint, ModelCheckpoint):
        return checkpoint
    model = empty_model(checkpoint)
    parts, converters, others = map_names(checkpoint, model)
    tied = model.all_tied_weights_keys
    for name, source in tied.items():
        if name in parts and source not in parts:
            parts[source] = parts.pop(name)
    held = [name for name in model.state_dict() if name in parts]
    parts |= {name: parts[source] for name, source in tied.items() if name not in parts and source in parts}
    check_match(checkpoint, model, parts, others)
    tensors = {name: checkpoint.tensors[parts[name][0].name] for name in held}
    for name in held:
        if parts[name][0].pattern is not None:
            tensors[name] = replace(tensors[name], shape=tuple(model.get_parameter(name).shape))
    config = checkpoint.config
    if any(name in held and not equal(checkpoint, parts[name], parts[source]) for name, source in tied.items()):
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
    return ModelCheckpoint(
        checkpoint.name, config, tensors, checkpoint.folder, stored=checkpoint, model=model, parts=parts, converters=converters
    )


def equal(checkpoint: Checkpoint, first: Parts, second: Parts) -> bool:
    """Whether two tensors are the same in value; taken for granted where only headers are at hand."""
    import torch

    if checkpoint.folder is None:
        return True
    a, b = (checkpoint.load([part], "cpu")[part] for part in (first[0].name, second[0].name))
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))


def map_names(checkpoint: Checkpoint, model: Any) -> tuple[dict[str, Parts], dict[str, Any], dict[str, str]]:
    """Name a checkpoint's tensors as the library does when it loads them.

    Args:
        checkpoint: what is stored.
        model: the library's model.

    Returns:
        What the model's tensors are made of; the converters by pattern; and the tensors that are none of the model's, by the
        name that the library reports them under.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    wanted = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    parts: dict[str, Parts] = {}
    others = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):  # the order in which pieces are put together
        renamed, _ = rename_source_key(name, renamings, converters)
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        written = None
        if target not in wanted and name in wanted:
            target, pattern = name, None
        elif renamed != name:  # and not only by the decoder's prefix
            written = prefix + name if target == prefix + renamed else name
        if target in wanted:
            parts.setdefault(target, []).append(Part(name, pattern, written))
        else:
            others[target] = name
    return parts, {pattern: converter for converter in converters for pattern in converter.source_patterns}, others


def check_match(checkpoint: Checkpoint, model: Any, parts: dict[str, Parts], others: dict[str, str]) -> None:
    """Raise a UserError unless the model's tensors are all there, plain numbers of the right shape, and nothing else is.

    What the library ignores may be there, and what cannot be a weight: masks and positions, which are no floating-point numbers,
    and what rotary embeddings compute. Weights that are none of the model's would be lost, which the library only warns of.

    Args:
        checkpoint: what is stored.
        model: the library's model.
        parts: what its tensors are made of.
        others: tensors that are none of the model's, by the name that the library reports them under.

    Raises:
        UserError: it cannot be converted.
    """
    stored, wanted = checkpoint.tensors, model.state_dict()
    for part in (piece.name for pieces in parts.values() for piece in pieces):
        if stored[part].dtype not in ITEMSIZE:
            raise UserError(
                f"{checkpoint.name}: {part} is stored as {stored[part].dtype}; supported: {', '.join(ITEMSIZE)} (unquantized)"
            )
    adapters = [name for name in others.values() if ".lora_" in name]
    if adapters:
        raise UserError(
            f"{checkpoint.name} holds an adapter, {listed(adapters)}; merge it (PEFT's merge_and_unload) and save again"
        )
    missing = [name for name in wanted if name not in parts]
    packed = {name.rpartition(".")[0]: name for name in others.values() if stored[name].dtype not in ITEMSIZE}
    for name in missing:
        if name.rpartition(".")[0] in packed:
            there = packed[name.rpartition(".")[0]]
            raise UserError(f"{checkpoint.name} is quantized: it has {there} in place of {name}; convert the unquantized one")
    decoder = f"{model.base_model_prefix}."
    absent = [name for name in missing if name.startswith(decoder)]
    if absent:
        layers = f"config.json announces {checkpoint.config.num_hidden_layers} layers"
        raise UserError(f"{checkpoint.name} has no tensor {listed(absent)}; {layers}")
    loading = SimpleNamespace(missing_keys=set(), unexpected_keys=set(others))
    model._adjust_missing_and_unexpected_keys(loading)
    weights = {name for name, part in others.items() if stored[part].dtype in ITEMSIZE and "rotary_emb." not in name}
    extra = [name for name in others if name in loading.unexpected_keys & weights]
    inside = (decoder, *(f"{name}." for name, _ in model.base_model.named_children()))
    heads = [others[name] for name in extra if not name.startswith(inside)]
    only = f"only language models ({type(model).__name__}) are converted"
    if heads:
        raise UserError(f"{checkpoint.name} holds {listed(heads)}, which is none of a language model's; {only}")
    if missing:
        raise UserError(f"{checkpoint.name} has no {listed(missing)}, and its config.json ties none (tie_word_embeddings); {only}")
    if extra:
        raise UserError(
            f"{checkpoint.name} holds, beyond what its config.json describes, {listed([others[name] for name in extra])}"
        )
    for name, empty in wanted.items():
        (part, pattern, _), *more = parts[name]
        if pattern is None and more:
            raise UserError(f"{checkpoint.name} holds both {part} and {more[0].name}, which are the same weight")
        if pattern is None and stored[part].shape != tuple(empty.shape):
            raise UserError(f"{checkpoint.name}: {part} is {list(stored[part].shape)}, config.json announces {list(empty.shape)}")
        held = sum(stored[piece.name].parameters for piece in parts[name])
        if held != empty.numel():
            raise UserError(
                f"{checkpoint.name}: {listed([piece.name for piece in parts[name]])} hold {held:,} numbers, "
                f"config.json announces {empty.numel():,} ({name})"
            )


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
