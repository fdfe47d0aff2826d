# SPDX-License-Identifier: Apache-2.0
"""Transformers models with Multi-head Latent Attention.

* A family (`LlamaMLA*`, `MistralMLA*`, ...) is the library's own model of that family with its attention replaced by
  `layer_mla.MLAAttention`; the MLP, norms, rotary embedding, masks, loss, parallel plans and generation are inherited.
* Its classes are made from its row in `configuration_mla.FAMILIES` when one is first asked for.
* `generate` is the library's too, with a cache of packed latents.

This file travels with every checkpoint: it imports only torch, transformers and files beside it.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .cache_mla import CACHE_NAME, prepare_latent_cache
from .configuration_mla import LOCK, Family, adopt_rope, config_class, family_of
from .layer_mla import MLAAttention, MLARMSNorm, rotary_embedding
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

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        # The library goes by the class's name, and of Gemma's norms, which multiply by 1 + w, it makes every w zero.
        if isinstance(module, MLARMSNorm):
            init.ones_(module.weight)


class MLAModelMixin:
    """Makes a family's decoder one with MLA: every layer gets it in place of the attention it was built with."""

    layers: Any
    rotary_emb: Any
    post_init: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        adopt_rope(config)
        super().__init__(config)  # type: ignore[call-arg]
        self.rotary_emb = rotary_embedding(config, type(self.rotary_emb))
        for layer_idx, layer in enumerate(self.layers):
            setattr(layer, config.family.attention_name, MLAAttention(config, layer_idx))
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
    base_model_prefix: str
    add_head: Any
    post_init: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        # The library's own would build a decoder without MLA first, or ask AutoModel for one, which doubts remote code.
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]
        setattr(self, self.base_model_prefix, self.decoder_class(config))
        self.add_head(config)
        self.post_init()


class MLAForCausalLMMixin(MLAHeadMixin):
    """Makes a family's language model one with MLA."""

    def add_head(self: Any, config: Any) -> None:
        """The language-model head, as all families have it."""
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.family.head_bias)
        if hasattr(config, "logit_scale"):
            self.logit_scale = config.logit_scale
        if hasattr(config, "router_aux_loss_coef"):  # what the library's forward pass of a mixture of experts takes from the model
            self.router_aux_loss_coef, self.num_experts_per_tok = config.router_aux_loss_coef, config.num_experts_per_tok
            self.num_experts = getattr(config, "num_experts", None) or config.num_local_experts


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
        given = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((dropout for dropout in given if dropout is not None), 0.1))
        self.score = nn.Linear(config.hidden_size, self.num_labels)


class MLAForQuestionAnsweringMixin(MLAHeadMixin, GenericForQuestionAnswering):
    """Scores every token as the start and the end of an answer."""

    def add_head(self: Any, config: PreTrainedConfig) -> None:
        """The library's head."""
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


MADE: dict[str, Any] = {}
"""Model classes by name, of the families that have been asked for."""


def make_models(family: Family) -> dict[str, Any]:
    """Make the model classes of a family on Transformers' own, which are imported here.

    Args:
        family: a row of the table.

    Returns:
        The classes by name.
    """
    source = CONFIG_MAPPING[family.model_type]
    own_decoder: Any = MODEL_MAPPING[source]
    own_pretrained = own_decoder.__base__
    own_language_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[source]
    made: dict[str, Any] = {}

    def make(suffix: str, bases: tuple[Any, ...], doc: str, **members: Any) -> Any:
        name = family.mla + suffix
        made[name] = type(name, bases, {"__module__": __name__, "__qualname__": name, "__doc__": doc, **members})
        return made[name]

    pretrained = make(
        "PreTrainedModel",
        (MLAPreTrainedModelMixin, own_pretrained),
        f"What all {family.base} models with MLA share.",
        config_class=config_class(family),
        # Whose boolean masks the kernel takes; what SDPA cannot do, the layer has done by the eager attention.
        _supports_sdpa=own_pretrained._supports_sdpa or family.softcap or family.sinks,
        _can_record_outputs=own_pretrained._can_record_outputs | {"attentions": MLAAttention},
        _can_set_experts_implementation=own_pretrained._can_set_experts_implementation,  # which looks into the source of a class
        # 2**20 is beyond float16; bfloat16 holds it.
        _keep_in_fp32_modules=["kv_a_layernorm", *(own_pretrained._keep_in_fp32_modules or ())],
    )
    decoder = make("Model", (MLAModelMixin, pretrained, own_decoder), f"The decoder of {family.base} without a head.")
    for suffix, bases, head in (
        (
            "ForCausalLM",
            (MLAForCausalLMMixin, LatentCacheGenerationMixin, pretrained, own_language_model),
            "a language-model head",
        ),
        ("ForSequenceClassification", (MLAForSequenceClassificationMixin, pretrained), "a head that classifies sequences"),
        ("ForTokenClassification", (MLAForTokenClassificationMixin, pretrained), "a head that classifies tokens"),
        ("ForQuestionAnswering", (MLAForQuestionAnsweringMixin, pretrained), "a head that finds answers"),
    ):
        prefix = own_pretrained.base_model_prefix  # the library's heads have one of their own
        make(suffix, bases, f"The decoder of {family.base} with {head}.", decoder_class=decoder, base_model_prefix=prefix)
    # A checkpoint keeps what it had for experts, one by one. The library puts together those of models that it has been told of:
    # of others they would be new and random.
    for own, ours in (
        (family.model_type, family.mla_type),
        (own_decoder.__name__, f"{family.mla}Model"),
        (own_language_model.__name__, f"{family.mla}ForCausalLM"),
    ):
        mapping = get_checkpoint_conversion_mapping(own)
        if mapping is not None:
            register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
    return made


def __getattr__(name: str) -> Any:
    """The classes of all families are attributes of this module like any other, to imports, to Auto classes and to pickle."""
    family = family_of(name)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with LOCK:
        config = config_class(family)  # where that makes the Auto classes know the family, its models are made by now
        if name == config.__name__:
            return config
        if name not in MADE:
            MADE.update(make_models(family))
        return MADE[name]
