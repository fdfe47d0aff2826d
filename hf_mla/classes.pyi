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
from transformers.models.cohere.configuration_cohere import CohereConfig
from transformers.models.cohere.modeling_cohere import CohereForCausalLM
from transformers.models.cohere.modeling_cohere import CohereModel
from transformers.models.cohere.modeling_cohere import CoherePreTrainedModel
from transformers.models.cohere2.configuration_cohere2 import Cohere2Config
from transformers.models.cohere2.modeling_cohere2 import Cohere2ForCausalLM
from transformers.models.cohere2.modeling_cohere2 import Cohere2Model
from transformers.models.cohere2.modeling_cohere2 import Cohere2PreTrainedModel
from transformers.models.exaone4.configuration_exaone4 import Exaone4Config
from transformers.models.exaone4.modeling_exaone4 import Exaone4ForCausalLM
from transformers.models.exaone4.modeling_exaone4 import Exaone4Model
from transformers.models.exaone4.modeling_exaone4 import Exaone4PreTrainedModel
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel
from transformers.models.glm4.configuration_glm4 import Glm4Config
from transformers.models.glm4.modeling_glm4 import Glm4ForCausalLM
from transformers.models.glm4.modeling_glm4 import Glm4Model
from transformers.models.glm4.modeling_glm4 import Glm4PreTrainedModel
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeModel
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoePreTrainedModel
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXPreTrainedModel
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import Ministral3ForCausalLM
from transformers.models.ministral3.modeling_ministral3 import Ministral3Model
from transformers.models.ministral3.modeling_ministral3 import Ministral3PreTrainedModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.mistral.modeling_mistral import MistralPreTrainedModel
from transformers.models.nemotron.configuration_nemotron import NemotronConfig
from transformers.models.nemotron.modeling_nemotron import NemotronForCausalLM
from transformers.models.nemotron.modeling_nemotron import NemotronModel
from transformers.models.nemotron.modeling_nemotron import NemotronPreTrainedModel
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2ForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2Model
from transformers.models.olmo2.modeling_olmo2 import Olmo2PreTrainedModel
from transformers.models.olmo3.configuration_olmo3 import Olmo3Config
from transformers.models.olmo3.modeling_olmo3 import Olmo3ForCausalLM
from transformers.models.olmo3.modeling_olmo3 import Olmo3Model
from transformers.models.olmo3.modeling_olmo3 import Olmo3PreTrainedModel
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeModel
from transformers.models.olmoe.modeling_olmoe import OlmoePreTrainedModel
from transformers.models.phi.configuration_phi import PhiConfig
from transformers.models.phi.modeling_phi import PhiForCausalLM
from transformers.models.phi.modeling_phi import PhiModel
from transformers.models.phi.modeling_phi import PhiPreTrainedModel
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3Model
from transformers.models.phi3.modeling_phi3 import Phi3PreTrainedModel
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Model
from transformers.models.smollm3.modeling_smollm3 import SmolLM3PreTrainedModel
from transformers.models.stablelm.configuration_stablelm import StableLmConfig
from transformers.models.stablelm.modeling_stablelm import StableLmForCausalLM
from transformers.models.stablelm.modeling_stablelm import StableLmModel
from transformers.models.stablelm.modeling_stablelm import StableLmPreTrainedModel
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

class Phi3MLAConfig(MLAConfigMixin, Phi3Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Phi3MLAPreTrainedModel(MLAPreTrainedModelMixin, Phi3PreTrainedModel):
    config: Phi3MLAConfig

class Phi3MLAModel(MLAModelMixin, Phi3MLAPreTrainedModel, Phi3Model):
    ...

class Phi3MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Phi3MLAPreTrainedModel, Phi3ForCausalLM):
    ...

class Phi3MLAForSequenceClassification(MLAForSequenceClassificationMixin, Phi3MLAPreTrainedModel):
    ...

class Phi3MLAForTokenClassification(MLAForTokenClassificationMixin, Phi3MLAPreTrainedModel):
    ...

class Phi3MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Phi3MLAPreTrainedModel):
    ...

class Gemma2MLAConfig(MLAConfigMixin, Gemma2Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Gemma2MLAPreTrainedModel(MLAPreTrainedModelMixin, Gemma2PreTrainedModel):
    config: Gemma2MLAConfig

class Gemma2MLAModel(MLAModelMixin, Gemma2MLAPreTrainedModel, Gemma2Model):
    ...

class Gemma2MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Gemma2MLAPreTrainedModel, Gemma2ForCausalLM):
    ...

class Gemma2MLAForSequenceClassification(MLAForSequenceClassificationMixin, Gemma2MLAPreTrainedModel):
    ...

class Gemma2MLAForTokenClassification(MLAForTokenClassificationMixin, Gemma2MLAPreTrainedModel):
    ...

class Gemma2MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Gemma2MLAPreTrainedModel):
    ...

class Gemma3TextMLAConfig(MLAConfigMixin, Gemma3TextConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Gemma3TextMLAPreTrainedModel(MLAPreTrainedModelMixin, Gemma3PreTrainedModel):
    config: Gemma3TextMLAConfig

class Gemma3TextMLAModel(MLAModelMixin, Gemma3TextMLAPreTrainedModel, Gemma3TextModel):
    ...

class Gemma3TextMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Gemma3TextMLAPreTrainedModel, Gemma3ForCausalLM):
    ...

class Gemma3TextMLAForSequenceClassification(MLAForSequenceClassificationMixin, Gemma3TextMLAPreTrainedModel):
    ...

class Gemma3TextMLAForTokenClassification(MLAForTokenClassificationMixin, Gemma3TextMLAPreTrainedModel):
    ...

class Gemma3TextMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Gemma3TextMLAPreTrainedModel):
    ...

class Olmo2MLAConfig(MLAConfigMixin, Olmo2Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Olmo2MLAPreTrainedModel(MLAPreTrainedModelMixin, Olmo2PreTrainedModel):
    config: Olmo2MLAConfig

class Olmo2MLAModel(MLAModelMixin, Olmo2MLAPreTrainedModel, Olmo2Model):
    ...

class Olmo2MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Olmo2MLAPreTrainedModel, Olmo2ForCausalLM):
    ...

class Olmo2MLAForSequenceClassification(MLAForSequenceClassificationMixin, Olmo2MLAPreTrainedModel):
    ...

class Olmo2MLAForTokenClassification(MLAForTokenClassificationMixin, Olmo2MLAPreTrainedModel):
    ...

class Olmo2MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Olmo2MLAPreTrainedModel):
    ...

class Olmo3MLAConfig(MLAConfigMixin, Olmo3Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Olmo3MLAPreTrainedModel(MLAPreTrainedModelMixin, Olmo3PreTrainedModel):
    config: Olmo3MLAConfig

class Olmo3MLAModel(MLAModelMixin, Olmo3MLAPreTrainedModel, Olmo3Model):
    ...

class Olmo3MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Olmo3MLAPreTrainedModel, Olmo3ForCausalLM):
    ...

class Olmo3MLAForSequenceClassification(MLAForSequenceClassificationMixin, Olmo3MLAPreTrainedModel):
    ...

class Olmo3MLAForTokenClassification(MLAForTokenClassificationMixin, Olmo3MLAPreTrainedModel):
    ...

class Olmo3MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Olmo3MLAPreTrainedModel):
    ...

class OlmoeMLAConfig(MLAConfigMixin, OlmoeConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class OlmoeMLAPreTrainedModel(MLAPreTrainedModelMixin, OlmoePreTrainedModel):
    config: OlmoeMLAConfig

class OlmoeMLAModel(MLAModelMixin, OlmoeMLAPreTrainedModel, OlmoeModel):
    ...

class OlmoeMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, OlmoeMLAPreTrainedModel, OlmoeForCausalLM):
    ...

class OlmoeMLAForSequenceClassification(MLAForSequenceClassificationMixin, OlmoeMLAPreTrainedModel):
    ...

class OlmoeMLAForTokenClassification(MLAForTokenClassificationMixin, OlmoeMLAPreTrainedModel):
    ...

class OlmoeMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, OlmoeMLAPreTrainedModel):
    ...

class SmolLM3MLAConfig(MLAConfigMixin, SmolLM3Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class SmolLM3MLAPreTrainedModel(MLAPreTrainedModelMixin, SmolLM3PreTrainedModel):
    config: SmolLM3MLAConfig

class SmolLM3MLAModel(MLAModelMixin, SmolLM3MLAPreTrainedModel, SmolLM3Model):
    ...

class SmolLM3MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, SmolLM3MLAPreTrainedModel, SmolLM3ForCausalLM):
    ...

class SmolLM3MLAForSequenceClassification(MLAForSequenceClassificationMixin, SmolLM3MLAPreTrainedModel):
    ...

class SmolLM3MLAForTokenClassification(MLAForTokenClassificationMixin, SmolLM3MLAPreTrainedModel):
    ...

class SmolLM3MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, SmolLM3MLAPreTrainedModel):
    ...

class Exaone4MLAConfig(MLAConfigMixin, Exaone4Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Exaone4MLAPreTrainedModel(MLAPreTrainedModelMixin, Exaone4PreTrainedModel):
    config: Exaone4MLAConfig

class Exaone4MLAModel(MLAModelMixin, Exaone4MLAPreTrainedModel, Exaone4Model):
    ...

class Exaone4MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Exaone4MLAPreTrainedModel, Exaone4ForCausalLM):
    ...

class Exaone4MLAForSequenceClassification(MLAForSequenceClassificationMixin, Exaone4MLAPreTrainedModel):
    ...

class Exaone4MLAForTokenClassification(MLAForTokenClassificationMixin, Exaone4MLAPreTrainedModel):
    ...

class Exaone4MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Exaone4MLAPreTrainedModel):
    ...

class Cohere2MLAConfig(MLAConfigMixin, Cohere2Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Cohere2MLAPreTrainedModel(MLAPreTrainedModelMixin, Cohere2PreTrainedModel):
    config: Cohere2MLAConfig

class Cohere2MLAModel(MLAModelMixin, Cohere2MLAPreTrainedModel, Cohere2Model):
    ...

class Cohere2MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Cohere2MLAPreTrainedModel, Cohere2ForCausalLM):
    ...

class Cohere2MLAForSequenceClassification(MLAForSequenceClassificationMixin, Cohere2MLAPreTrainedModel):
    ...

class Cohere2MLAForTokenClassification(MLAForTokenClassificationMixin, Cohere2MLAPreTrainedModel):
    ...

class Cohere2MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Cohere2MLAPreTrainedModel):
    ...

class Glm4MoeMLAConfig(MLAConfigMixin, Glm4MoeConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Glm4MoeMLAPreTrainedModel(MLAPreTrainedModelMixin, Glm4MoePreTrainedModel):
    config: Glm4MoeMLAConfig

class Glm4MoeMLAModel(MLAModelMixin, Glm4MoeMLAPreTrainedModel, Glm4MoeModel):
    ...

class Glm4MoeMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Glm4MoeMLAPreTrainedModel, Glm4MoeForCausalLM):
    ...

class Glm4MoeMLAForSequenceClassification(MLAForSequenceClassificationMixin, Glm4MoeMLAPreTrainedModel):
    ...

class Glm4MoeMLAForTokenClassification(MLAForTokenClassificationMixin, Glm4MoeMLAPreTrainedModel):
    ...

class Glm4MoeMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Glm4MoeMLAPreTrainedModel):
    ...

class Glm4MLAConfig(MLAConfigMixin, Glm4Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Glm4MLAPreTrainedModel(MLAPreTrainedModelMixin, Glm4PreTrainedModel):
    config: Glm4MLAConfig

class Glm4MLAModel(MLAModelMixin, Glm4MLAPreTrainedModel, Glm4Model):
    ...

class Glm4MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Glm4MLAPreTrainedModel, Glm4ForCausalLM):
    ...

class Glm4MLAForSequenceClassification(MLAForSequenceClassificationMixin, Glm4MLAPreTrainedModel):
    ...

class Glm4MLAForTokenClassification(MLAForTokenClassificationMixin, Glm4MLAPreTrainedModel):
    ...

class Glm4MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Glm4MLAPreTrainedModel):
    ...

class Ministral3MLAConfig(MLAConfigMixin, Ministral3Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Ministral3MLAPreTrainedModel(MLAPreTrainedModelMixin, Ministral3PreTrainedModel):
    config: Ministral3MLAConfig

class Ministral3MLAModel(MLAModelMixin, Ministral3MLAPreTrainedModel, Ministral3Model):
    ...

class Ministral3MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Ministral3MLAPreTrainedModel, Ministral3ForCausalLM):
    ...

class Ministral3MLAForSequenceClassification(MLAForSequenceClassificationMixin, Ministral3MLAPreTrainedModel):
    ...

class Ministral3MLAForTokenClassification(MLAForTokenClassificationMixin, Ministral3MLAPreTrainedModel):
    ...

class Ministral3MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Ministral3MLAPreTrainedModel):
    ...

class PhiMLAConfig(MLAConfigMixin, PhiConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = True

class PhiMLAPreTrainedModel(MLAPreTrainedModelMixin, PhiPreTrainedModel):
    config: PhiMLAConfig

class PhiMLAModel(MLAModelMixin, PhiMLAPreTrainedModel, PhiModel):
    ...

class PhiMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, PhiMLAPreTrainedModel, PhiForCausalLM):
    ...

class PhiMLAForSequenceClassification(MLAForSequenceClassificationMixin, PhiMLAPreTrainedModel):
    ...

class PhiMLAForTokenClassification(MLAForTokenClassificationMixin, PhiMLAPreTrainedModel):
    ...

class PhiMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, PhiMLAPreTrainedModel):
    ...

class StableLmMLAConfig(MLAConfigMixin, StableLmConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class StableLmMLAPreTrainedModel(MLAPreTrainedModelMixin, StableLmPreTrainedModel):
    config: StableLmMLAConfig

class StableLmMLAModel(MLAModelMixin, StableLmMLAPreTrainedModel, StableLmModel):
    ...

class StableLmMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, StableLmMLAPreTrainedModel, StableLmForCausalLM):
    ...

class StableLmMLAForSequenceClassification(MLAForSequenceClassificationMixin, StableLmMLAPreTrainedModel):
    ...

class StableLmMLAForTokenClassification(MLAForTokenClassificationMixin, StableLmMLAPreTrainedModel):
    ...

class StableLmMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, StableLmMLAPreTrainedModel):
    ...

class GPTNeoXMLAConfig(MLAConfigMixin, GPTNeoXConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class GPTNeoXMLAPreTrainedModel(MLAPreTrainedModelMixin, GPTNeoXPreTrainedModel):
    config: GPTNeoXMLAConfig

class GPTNeoXMLAModel(MLAModelMixin, GPTNeoXMLAPreTrainedModel, GPTNeoXModel):
    ...

class GPTNeoXMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, GPTNeoXMLAPreTrainedModel, GPTNeoXForCausalLM):
    ...

class GPTNeoXMLAForSequenceClassification(MLAForSequenceClassificationMixin, GPTNeoXMLAPreTrainedModel):
    ...

class GPTNeoXMLAForTokenClassification(MLAForTokenClassificationMixin, GPTNeoXMLAPreTrainedModel):
    ...

class GPTNeoXMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, GPTNeoXMLAPreTrainedModel):
    ...

class NemotronMLAConfig(MLAConfigMixin, NemotronConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class NemotronMLAPreTrainedModel(MLAPreTrainedModelMixin, NemotronPreTrainedModel):
    config: NemotronMLAConfig

class NemotronMLAModel(MLAModelMixin, NemotronMLAPreTrainedModel, NemotronModel):
    ...

class NemotronMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, NemotronMLAPreTrainedModel, NemotronForCausalLM):
    ...

class NemotronMLAForSequenceClassification(MLAForSequenceClassificationMixin, NemotronMLAPreTrainedModel):
    ...

class NemotronMLAForTokenClassification(MLAForTokenClassificationMixin, NemotronMLAPreTrainedModel):
    ...

class NemotronMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, NemotronMLAPreTrainedModel):
    ...

class CohereMLAConfig(MLAConfigMixin, CohereConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class CohereMLAPreTrainedModel(MLAPreTrainedModelMixin, CoherePreTrainedModel):
    config: CohereMLAConfig

class CohereMLAModel(MLAModelMixin, CohereMLAPreTrainedModel, CohereModel):
    ...

class CohereMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, CohereMLAPreTrainedModel, CohereForCausalLM):
    ...

class CohereMLAForSequenceClassification(MLAForSequenceClassificationMixin, CohereMLAPreTrainedModel):
    ...

class CohereMLAForTokenClassification(MLAForTokenClassificationMixin, CohereMLAPreTrainedModel):
    ...

class CohereMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, CohereMLAPreTrainedModel):
    ...

class GptOssMLAConfig(MLAConfigMixin, GptOssConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class GptOssMLAPreTrainedModel(MLAPreTrainedModelMixin, GptOssPreTrainedModel):
    config: GptOssMLAConfig

class GptOssMLAModel(MLAModelMixin, GptOssMLAPreTrainedModel, GptOssModel):
    ...

class GptOssMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, GptOssMLAPreTrainedModel, GptOssForCausalLM):
    ...

class GptOssMLAForSequenceClassification(MLAForSequenceClassificationMixin, GptOssMLAPreTrainedModel):
    ...

class GptOssMLAForTokenClassification(MLAForTokenClassificationMixin, GptOssMLAPreTrainedModel):
    ...

class GptOssMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, GptOssMLAPreTrainedModel):
    ...
