# SPDX-License-Identifier: Apache-2.0
# The classes of all families, for editors and type checkers; written from the table by tests/stub.py.

from .configuration_mla import MLAConfigMixin
from .modeling_mla import LatentCacheGenerationMixin
from .modeling_mla import MLAForCausalLMMixin
from .modeling_mla import MLAForQuestionAnsweringMixin
from .modeling_mla import MLAForSequenceClassificationMixin
from .modeling_mla import MLAForTokenClassificationMixin
from .modeling_mla import MLAModelMixin
from .modeling_mla import MLAPreTrainedModelMixin
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.mistral.modeling_mistral import MistralPreTrainedModel
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralModel
from transformers.models.mixtral.modeling_mixtral import MixtralPreTrainedModel
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoePreTrainedModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoePreTrainedModel
from typing import ClassVar

class LlamaMLAConfig(MLAConfigMixin, LlamaConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class LlamaMLAPreTrainedModel(MLAPreTrainedModelMixin, LlamaPreTrainedModel):
    config: LlamaMLAConfig

class LlamaMLAModel(MLAModelMixin, LlamaMLAPreTrainedModel, LlamaModel):
    ...

class LlamaMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, LlamaMLAPreTrainedModel, LlamaForCausalLM):
    ...

class LlamaMLAForSequenceClassification(MLAForSequenceClassificationMixin, LlamaMLAPreTrainedModel):
    ...

class LlamaMLAForTokenClassification(MLAForTokenClassificationMixin, LlamaMLAPreTrainedModel):
    ...

class LlamaMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, LlamaMLAPreTrainedModel):
    ...

class MistralMLAConfig(MLAConfigMixin, MistralConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class MistralMLAPreTrainedModel(MLAPreTrainedModelMixin, MistralPreTrainedModel):
    config: MistralMLAConfig

class MistralMLAModel(MLAModelMixin, MistralMLAPreTrainedModel, MistralModel):
    ...

class MistralMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, MistralMLAPreTrainedModel, MistralForCausalLM):
    ...

class MistralMLAForSequenceClassification(MLAForSequenceClassificationMixin, MistralMLAPreTrainedModel):
    ...

class MistralMLAForTokenClassification(MLAForTokenClassificationMixin, MistralMLAPreTrainedModel):
    ...

class MistralMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, MistralMLAPreTrainedModel):
    ...

class Qwen2MLAConfig(MLAConfigMixin, Qwen2Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = True

class Qwen2MLAPreTrainedModel(MLAPreTrainedModelMixin, Qwen2PreTrainedModel):
    config: Qwen2MLAConfig

class Qwen2MLAModel(MLAModelMixin, Qwen2MLAPreTrainedModel, Qwen2Model):
    ...

class Qwen2MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Qwen2MLAPreTrainedModel, Qwen2ForCausalLM):
    ...

class Qwen2MLAForSequenceClassification(MLAForSequenceClassificationMixin, Qwen2MLAPreTrainedModel):
    ...

class Qwen2MLAForTokenClassification(MLAForTokenClassificationMixin, Qwen2MLAPreTrainedModel):
    ...

class Qwen2MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Qwen2MLAPreTrainedModel):
    ...

class Qwen3MLAConfig(MLAConfigMixin, Qwen3Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Qwen3MLAPreTrainedModel(MLAPreTrainedModelMixin, Qwen3PreTrainedModel):
    config: Qwen3MLAConfig

class Qwen3MLAModel(MLAModelMixin, Qwen3MLAPreTrainedModel, Qwen3Model):
    ...

class Qwen3MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Qwen3MLAPreTrainedModel, Qwen3ForCausalLM):
    ...

class Qwen3MLAForSequenceClassification(MLAForSequenceClassificationMixin, Qwen3MLAPreTrainedModel):
    ...

class Qwen3MLAForTokenClassification(MLAForTokenClassificationMixin, Qwen3MLAPreTrainedModel):
    ...

class Qwen3MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Qwen3MLAPreTrainedModel):
    ...

class MixtralMLAConfig(MLAConfigMixin, MixtralConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class MixtralMLAPreTrainedModel(MLAPreTrainedModelMixin, MixtralPreTrainedModel):
    config: MixtralMLAConfig

class MixtralMLAModel(MLAModelMixin, MixtralMLAPreTrainedModel, MixtralModel):
    ...

class MixtralMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, MixtralMLAPreTrainedModel, MixtralForCausalLM):
    ...

class MixtralMLAForSequenceClassification(MLAForSequenceClassificationMixin, MixtralMLAPreTrainedModel):
    ...

class MixtralMLAForTokenClassification(MLAForTokenClassificationMixin, MixtralMLAPreTrainedModel):
    ...

class MixtralMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, MixtralMLAPreTrainedModel):
    ...

class Qwen2MoeMLAConfig(MLAConfigMixin, Qwen2MoeConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = True

class Qwen2MoeMLAPreTrainedModel(MLAPreTrainedModelMixin, Qwen2MoePreTrainedModel):
    config: Qwen2MoeMLAConfig

class Qwen2MoeMLAModel(MLAModelMixin, Qwen2MoeMLAPreTrainedModel, Qwen2MoeModel):
    ...

class Qwen2MoeMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Qwen2MoeMLAPreTrainedModel, Qwen2MoeForCausalLM):
    ...

class Qwen2MoeMLAForSequenceClassification(MLAForSequenceClassificationMixin, Qwen2MoeMLAPreTrainedModel):
    ...

class Qwen2MoeMLAForTokenClassification(MLAForTokenClassificationMixin, Qwen2MoeMLAPreTrainedModel):
    ...

class Qwen2MoeMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Qwen2MoeMLAPreTrainedModel):
    ...

class Qwen3MoeMLAConfig(MLAConfigMixin, Qwen3MoeConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Qwen3MoeMLAPreTrainedModel(MLAPreTrainedModelMixin, Qwen3MoePreTrainedModel):
    config: Qwen3MoeMLAConfig

class Qwen3MoeMLAModel(MLAModelMixin, Qwen3MoeMLAPreTrainedModel, Qwen3MoeModel):
    ...

class Qwen3MoeMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Qwen3MoeMLAPreTrainedModel, Qwen3MoeForCausalLM):
    ...

class Qwen3MoeMLAForSequenceClassification(MLAForSequenceClassificationMixin, Qwen3MoeMLAPreTrainedModel):
    ...

class Qwen3MoeMLAForTokenClassification(MLAForTokenClassificationMixin, Qwen3MoeMLAPreTrainedModel):
    ...

class Qwen3MoeMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Qwen3MoeMLAPreTrainedModel):
    ...
