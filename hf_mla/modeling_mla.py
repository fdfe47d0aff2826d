# SPDX-License-Identifier: Apache-2.0
"""Transformers models with Multi-head Latent Attention.

* A family (`LlamaMLA*`, `MistralMLA*`, ...) is the library's own model of that family with its attention replaced by
  `layer_mla.MLAAttention`; the MLP, norms, rotary embedding, masks, loss, parallel plans and generation are inherited.
* `generate` is the library's too, with a cache of packed latents.

This file travels with every checkpoint: it imports only torch, transformers and files beside it.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model, Qwen2PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model, Qwen3PreTrainedModel

from .cache_mla import CACHE_NAME, prepare_latent_cache
from .configuration_mla import LlamaMLAConfig, MistralMLAConfig, Qwen2MLAConfig, Qwen3MLAConfig
from .layer_mla import MLAAttention
from .pages_mla import prepare_latent_pages


class LatentCacheGenerationMixin(GenerationMixin):
    """Makes `generate` use the compressed cache; caches that the user passes are left alone."""

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        prepare = super()._prepare_cache_for_generation  # type: ignore[misc]
        prepare_latent_cache(prepare, self.config, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; the pages hold `kv_floats_per_token_per_layer` numbers a token (rounded up to an even one)."""
        prepare = functools.partial(super().init_continuous_batching, *args, **kwargs)
        return prepare_latent_pages(prepare, self, self.config.kv_floats_per_token_per_layer)


class MLAPreTrainedModelMixin:
    """What all models with MLA share."""

    _keep_in_fp32_modules: Any = ["kv_a_layernorm"]  # 2**20 is beyond float16; bfloat16 holds it


class MLAModelMixin:
    """Makes a family's decoder one with MLA: every layer gets it in place of the attention it was built with."""

    layers: Any
    post_init: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = MLAAttention(config, layer_idx)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers; `past_key_values` is the name of `cache` before 5.24, and both are taken."""
        if isinstance(cache, Cache) or cache is None:
            kwargs[CACHE_NAME] = past_key_values if cache is None else cache
        else:
            kwargs["cache"] = cache  # the pages of continuous batching, which never had another name
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            attended_ranges={},
            **kwargs,
        )


class MLAHeadMixin:
    """Makes a model with a head stand on a decoder with MLA, `decoder_class`; `add_head` makes the modules after it."""

    decoder_class: type
    add_head: Any
    post_init: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        # The library's own would build a decoder without MLA first, or ask AutoModel for one, which doubts remote code.
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]
        self.model = self.decoder_class(config)
        self.add_head(config)
        self.post_init()


class MLAForCausalLMMixin(MLAHeadMixin):
    """Makes a family's language model one with MLA."""

    def add_head(self: Any, config: PreTrainedConfig) -> None:
        """The language-model head, as all families have it."""
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class MLAForSequenceClassificationMixin(MLAHeadMixin, GenericForSequenceClassification):
    """Scores a sequence by its last token that is not padding."""

    def add_head(self: Any, config: PreTrainedConfig) -> None:
        """The library's head."""
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)


class MLAForTokenClassificationMixin(MLAHeadMixin, GenericForTokenClassification):
    """Scores every token."""

    def add_head(self: Any, config: PreTrainedConfig) -> None:
        """The library's head, dropout of 0.1 included where the configuration names none."""
        self.num_labels = config.num_labels
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)


class MLAForQuestionAnsweringMixin(MLAHeadMixin, GenericForQuestionAnswering):
    """Scores every token as the start and the end of an answer."""

    def add_head(self: Any, config: PreTrainedConfig) -> None:
        """The library's head."""
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


class LlamaMLAPreTrainedModel(MLAPreTrainedModelMixin, LlamaPreTrainedModel):
    """What all Llama models with MLA share."""

    config: LlamaMLAConfig
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": MLAAttention}


class LlamaMLAModel(MLAModelMixin, LlamaMLAPreTrainedModel, LlamaModel):
    """The decoder of Llama without a head."""


class LlamaMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, LlamaMLAPreTrainedModel, LlamaForCausalLM):
    """The decoder of Llama with a language-model head."""

    decoder_class = LlamaMLAModel


class LlamaMLAForSequenceClassification(MLAForSequenceClassificationMixin, LlamaMLAPreTrainedModel):
    """The decoder of Llama with a head that classifies sequences."""

    decoder_class = LlamaMLAModel


class LlamaMLAForTokenClassification(MLAForTokenClassificationMixin, LlamaMLAPreTrainedModel):
    """The decoder of Llama with a head that classifies tokens."""

    decoder_class = LlamaMLAModel


class LlamaMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, LlamaMLAPreTrainedModel):
    """The decoder of Llama with a head that finds answers."""

    decoder_class = LlamaMLAModel


class MistralMLAPreTrainedModel(MLAPreTrainedModelMixin, MistralPreTrainedModel):
    """What all Mistral models with MLA share."""

    config: MistralMLAConfig
    _can_record_outputs = {"hidden_states": MistralDecoderLayer, "attentions": MLAAttention}


class MistralMLAModel(MLAModelMixin, MistralMLAPreTrainedModel, MistralModel):
    """The decoder of Mistral without a head."""


class MistralMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, MistralMLAPreTrainedModel, MistralForCausalLM):
    """The decoder of Mistral with a language-model head."""

    decoder_class = MistralMLAModel


class MistralMLAForSequenceClassification(MLAForSequenceClassificationMixin, MistralMLAPreTrainedModel):
    """The decoder of Mistral with a head that classifies sequences."""

    decoder_class = MistralMLAModel


class MistralMLAForTokenClassification(MLAForTokenClassificationMixin, MistralMLAPreTrainedModel):
    """The decoder of Mistral with a head that classifies tokens."""

    decoder_class = MistralMLAModel


class MistralMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, MistralMLAPreTrainedModel):
    """The decoder of Mistral with a head that finds answers."""

    decoder_class = MistralMLAModel


class Qwen2MLAPreTrainedModel(MLAPreTrainedModelMixin, Qwen2PreTrainedModel):
    """What all Qwen2 models with MLA share."""

    config: Qwen2MLAConfig
    _can_record_outputs = {"hidden_states": Qwen2DecoderLayer, "attentions": MLAAttention}


class Qwen2MLAModel(MLAModelMixin, Qwen2MLAPreTrainedModel, Qwen2Model):
    """The decoder of Qwen2 without a head."""


class Qwen2MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Qwen2MLAPreTrainedModel, Qwen2ForCausalLM):
    """The decoder of Qwen2 with a language-model head."""

    decoder_class = Qwen2MLAModel


class Qwen2MLAForSequenceClassification(MLAForSequenceClassificationMixin, Qwen2MLAPreTrainedModel):
    """The decoder of Qwen2 with a head that classifies sequences."""

    decoder_class = Qwen2MLAModel


class Qwen2MLAForTokenClassification(MLAForTokenClassificationMixin, Qwen2MLAPreTrainedModel):
    """The decoder of Qwen2 with a head that classifies tokens."""

    decoder_class = Qwen2MLAModel


class Qwen2MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Qwen2MLAPreTrainedModel):
    """The decoder of Qwen2 with a head that finds answers."""

    decoder_class = Qwen2MLAModel


class Qwen3MLAPreTrainedModel(MLAPreTrainedModelMixin, Qwen3PreTrainedModel):
    """What all Qwen3 models with MLA share."""

    config: Qwen3MLAConfig
    _can_record_outputs = {"hidden_states": Qwen3DecoderLayer, "attentions": MLAAttention}


class Qwen3MLAModel(MLAModelMixin, Qwen3MLAPreTrainedModel, Qwen3Model):
    """The decoder of Qwen3 without a head."""


class Qwen3MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Qwen3MLAPreTrainedModel, Qwen3ForCausalLM):
    """The decoder of Qwen3 with a language-model head."""

    decoder_class = Qwen3MLAModel


class Qwen3MLAForSequenceClassification(MLAForSequenceClassificationMixin, Qwen3MLAPreTrainedModel):
    """The decoder of Qwen3 with a head that classifies sequences."""

    decoder_class = Qwen3MLAModel


class Qwen3MLAForTokenClassification(MLAForTokenClassificationMixin, Qwen3MLAPreTrainedModel):
    """The decoder of Qwen3 with a head that classifies tokens."""

    decoder_class = Qwen3MLAModel


class Qwen3MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Qwen3MLAPreTrainedModel):
    """The decoder of Qwen3 with a head that finds answers."""

    decoder_class = Qwen3MLAModel
