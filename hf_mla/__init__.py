# SPDX-License-Identifier: Apache-2.0
"""Multi-head Latent Attention for Transformers.

Importing this package registers the model types, so that `AutoModelForCausalLM.from_pretrained` loads a converted
checkpoint without `trust_remote_code`. Models saved after that carry their code with them. It registers the attention
implementation "hf_mla" too, with which the library's own MLA models decode over the latent.
"""

from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from . import modeling_mla, native_mla
from .cache_mla import LatentDynamicLayer, MLACache, cache_bytes, cache_of
from .configuration_mla import CONFIGS, LlamaMLAConfig, MistralMLAConfig, Qwen2MLAConfig, Qwen3MLAConfig, __version__, auto_map
from .layer_mla import MLAAttention
from .modeling_mla import (
    LlamaMLAForCausalLM,
    LlamaMLAForQuestionAnswering,
    LlamaMLAForSequenceClassification,
    LlamaMLAForTokenClassification,
    LlamaMLAModel,
    LlamaMLAPreTrainedModel,
    MistralMLAForCausalLM,
    MistralMLAForQuestionAnswering,
    MistralMLAForSequenceClassification,
    MistralMLAForTokenClassification,
    MistralMLAModel,
    MistralMLAPreTrainedModel,
    Qwen2MLAForCausalLM,
    Qwen2MLAForQuestionAnswering,
    Qwen2MLAForSequenceClassification,
    Qwen2MLAForTokenClassification,
    Qwen2MLAModel,
    Qwen2MLAPreTrainedModel,
    Qwen3MLAForCausalLM,
    Qwen3MLAForQuestionAnswering,
    Qwen3MLAForSequenceClassification,
    Qwen3MLAForTokenClassification,
    Qwen3MLAModel,
    Qwen3MLAPreTrainedModel,
)
from .native_mla import absorb
from .peft_mla import register_target_modules


__all__ = [
    "LatentDynamicLayer",
    "LlamaMLAConfig",
    "LlamaMLAForCausalLM",
    "LlamaMLAForQuestionAnswering",
    "LlamaMLAForSequenceClassification",
    "LlamaMLAForTokenClassification",
    "LlamaMLAModel",
    "LlamaMLAPreTrainedModel",
    "MLAAttention",
    "MLACache",
    "MistralMLAConfig",
    "MistralMLAForCausalLM",
    "MistralMLAForQuestionAnswering",
    "MistralMLAForSequenceClassification",
    "MistralMLAForTokenClassification",
    "MistralMLAModel",
    "MistralMLAPreTrainedModel",
    "Qwen2MLAConfig",
    "Qwen2MLAForCausalLM",
    "Qwen2MLAForQuestionAnswering",
    "Qwen2MLAForSequenceClassification",
    "Qwen2MLAForTokenClassification",
    "Qwen2MLAModel",
    "Qwen2MLAPreTrainedModel",
    "Qwen3MLAConfig",
    "Qwen3MLAForCausalLM",
    "Qwen3MLAForQuestionAnswering",
    "Qwen3MLAForSequenceClassification",
    "Qwen3MLAForTokenClassification",
    "Qwen3MLAModel",
    "Qwen3MLAPreTrainedModel",
    "__version__",
    "absorb",
    "cache_bytes",
    "cache_of",
]

# The library looks class names up in these tables (the trainer's label smoothing does); `register` leaves them alone.
_NAMES: dict[str, Any] = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}

for _config in CONFIGS:
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto_class, _reference in auto_map(_config.__name__.removesuffix("Config")).items():
        _class = getattr(modeling_mla, _reference.removeprefix("modeling_mla."))
        _class.register_for_auto_class(_auto_class)  # from here on `save_pretrained` writes the code beside the weights
        if _auto_class in _NAMES:
            getattr(transformers, _auto_class).register(_config, _class, exist_ok=True)
            _NAMES[_auto_class][_config.model_type] = _class.__name__

native_mla.register()
register_target_modules([_config.model_type for _config in CONFIGS])
