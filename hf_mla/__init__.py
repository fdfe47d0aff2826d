# SPDX-License-Identifier: Apache-2.0
"""Multi-head Latent Attention for Transformers.

Importing this package registers the model types, so that `AutoModelForCausalLM.from_pretrained` loads a converted
checkpoint without `trust_remote_code`. Models saved after that carry their code with them.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from .cache_mla import LatentDynamicLayer, MLACache, cache_bytes
from .configuration_mla import LlamaMLAConfig, MistralMLAConfig, Qwen2MLAConfig, Qwen3MLAConfig, __version__
from .modeling_mla import (
    LlamaMLAForCausalLM,
    LlamaMLAModel,
    LlamaMLAPreTrainedModel,
    MistralMLAForCausalLM,
    MistralMLAModel,
    MistralMLAPreTrainedModel,
    MLAAttention,
    Qwen2MLAForCausalLM,
    Qwen2MLAModel,
    Qwen2MLAPreTrainedModel,
    Qwen3MLAForCausalLM,
    Qwen3MLAModel,
    Qwen3MLAPreTrainedModel,
)


__all__ = [
    "LatentDynamicLayer",
    "LlamaMLAConfig",
    "LlamaMLAForCausalLM",
    "LlamaMLAModel",
    "LlamaMLAPreTrainedModel",
    "MLAAttention",
    "MLACache",
    "MistralMLAConfig",
    "MistralMLAForCausalLM",
    "MistralMLAModel",
    "MistralMLAPreTrainedModel",
    "Qwen2MLAConfig",
    "Qwen2MLAForCausalLM",
    "Qwen2MLAModel",
    "Qwen2MLAPreTrainedModel",
    "Qwen3MLAConfig",
    "Qwen3MLAForCausalLM",
    "Qwen3MLAModel",
    "Qwen3MLAPreTrainedModel",
    "__version__",
    "cache_bytes",
]

for _config, _model, _causal_lm in (
    (LlamaMLAConfig, LlamaMLAModel, LlamaMLAForCausalLM),
    (MistralMLAConfig, MistralMLAModel, MistralMLAForCausalLM),
    (Qwen2MLAConfig, Qwen2MLAModel, Qwen2MLAForCausalLM),
    (Qwen3MLAConfig, Qwen3MLAModel, Qwen3MLAForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
    # From here on `save_pretrained` writes the code beside the weights.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")
    # `register` leaves the name tables alone; the trainer's label smoothing and the text-generation pipeline read them.
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _causal_lm.__name__
