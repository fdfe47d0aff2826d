# SPDX-License-Identifier: Apache-2.0
"""Multi-head Latent Attention for Transformers.

Importing this package registers the model types, so that `AutoModelForCausalLM.from_pretrained` loads a converted
checkpoint without `trust_remote_code`. Models saved after that carry their code with them. It registers the attention
implementation "hf_mla" too, with which the library's own MLA models decode over the latent.

The classes of a family (`LlamaMLAConfig`, `LlamaMLAForCausalLM`, ...) are made when one is first asked for.
"""

import sys
from typing import TYPE_CHECKING, Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from . import modeling_mla, native_mla
from .cache_mla import LatentDynamicLayer, MLACache, cache_bytes, cache_of
from .configuration_mla import CLASSES, FAMILIES, HEADS, WHEN_MADE, Family, __version__, auto_map, config_class
from .layer_mla import MLAAttention
from .native_mla import absorb
from .peft_mla import register_target_modules


__all__ = ["LatentDynamicLayer", "MLAAttention", "MLACache", "__version__", "absorb", "cache_bytes", "cache_of"]

# The library looks class names up in these tables (the trainer's label smoothing does); `register` leaves them alone.
_NAMES: dict[str, Any] = {
    "AutoConfig": CONFIG_MAPPING_NAMES,
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
_families = [family for family in FAMILIES.values() if family.model_type in CONFIG_MAPPING_NAMES]  # others are of a newer library


def _register(family: Family) -> None:
    """Make the Auto classes know the classes of a family, which are made for it."""
    config = config_class(family)
    for auto_class, reference in auto_map(family.mla).items():
        cls = getattr(modeling_mla, reference.removeprefix("modeling_mla."))
        cls.register_for_auto_class(auto_class)  # from here on `save_pretrained` writes the code beside the weights
        if cls is not config:
            getattr(transformers, auto_class).register(config, cls, exist_ok=True)


if TYPE_CHECKING:
    from .classes import *  # noqa: F403 - a stub, written from the table of families by tests/stub.py
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(modeling_mla, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


# The library makes its own classes on demand: a table has the name of the class, which is looked up in the module
# `transformers.models.<model type>`. Ours are there too, so `AutoConfig` finds a configuration class here, and what makes that
# registers the models.
WHEN_MADE.append(_register)
for _family in _families:
    sys.modules[f"transformers.models.{_family.mla_type}"] = sys.modules[__name__]
    for _auto_class, _reference in auto_map(_family.mla).items():
        _NAMES[_auto_class][_family.mla_type] = _reference.removeprefix("modeling_mla.")
    __all__ += [_family.mla + _suffix for _suffix in (*CLASSES, *HEADS)]

native_mla.register()
register_target_modules([_family.mla_type for _family in _families])
