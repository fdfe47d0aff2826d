# SPDX-License-Identifier: Apache-2.0
# The classes of all families, for editors and type checkers; written from the table by tests/stub.py.
# mypy: disable-error-code="misc, assignment"
# (Some of the library's own classes say more narrowly than others what their configuration is.)

from .configuration_mla import MLAConfigMixin
from .modeling_mla import LatentCacheGenerationMixin
from .modeling_mla import MLAForCausalLMMixin
from .modeling_mla import MLAForQuestionAnsweringMixin
from .modeling_mla import MLAForSequenceClassificationMixin
from .modeling_mla import MLAForTokenClassificationMixin
from .modeling_mla import MLAModelMixin
from .modeling_mla import MLAPreTrainedModelMixin
from transformers.models.apertus.configuration_apertus import ApertusConfig
from transformers.models.apertus.modeling_apertus import ApertusForCausalLM
from transformers.models.apertus.modeling_apertus import ApertusModel
from transformers.models.apertus.modeling_apertus import ApertusPreTrainedModel
from transformers.models.arcee.configuration_arcee import ArceeConfig
from transformers.models.arcee.modeling_arcee import ArceeForCausalLM
from transformers.models.arcee.modeling_arcee import ArceeModel
from transformers.models.arcee.modeling_arcee import ArceePreTrainedModel
from transformers.models.cohere.configuration_cohere import CohereConfig
from transformers.models.cohere.modeling_cohere import CohereForCausalLM
from transformers.models.cohere.modeling_cohere import CohereModel
from transformers.models.cohere.modeling_cohere import CoherePreTrainedModel
from transformers.models.cohere2.configuration_cohere2 import Cohere2Config
from transformers.models.cohere2.modeling_cohere2 import Cohere2ForCausalLM
from transformers.models.cohere2.modeling_cohere2 import Cohere2Model
from transformers.models.cohere2.modeling_cohere2 import Cohere2PreTrainedModel
from transformers.models.cwm.configuration_cwm import CwmConfig
from transformers.models.cwm.modeling_cwm import CwmForCausalLM
from transformers.models.cwm.modeling_cwm import CwmModel
from transformers.models.cwm.modeling_cwm import CwmPreTrainedModel
from transformers.models.dots1.configuration_dots1 import Dots1Config
from transformers.models.dots1.modeling_dots1 import Dots1ForCausalLM
from transformers.models.dots1.modeling_dots1 import Dots1Model
from transformers.models.dots1.modeling_dots1 import Dots1PreTrainedModel
from transformers.models.exaone4.configuration_exaone4 import Exaone4Config
from transformers.models.exaone4.modeling_exaone4 import Exaone4ForCausalLM
from transformers.models.exaone4.modeling_exaone4 import Exaone4Model
from transformers.models.exaone4.modeling_exaone4 import Exaone4PreTrainedModel
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaModel
from transformers.models.gemma.modeling_gemma import GemmaPreTrainedModel
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
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteForCausalLM
from transformers.models.granite.modeling_granite import GraniteModel
from transformers.models.granite.modeling_granite import GranitePreTrainedModel
from transformers.models.granitemoe.configuration_granitemoe import GraniteMoeConfig
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeForCausalLM
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeModel
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoePreTrainedModel
from transformers.models.granitemoeshared.configuration_granitemoeshared import GraniteMoeSharedConfig
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedForCausalLM
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedModel
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedPreTrainedModel
from transformers.models.hyperclovax.configuration_hyperclovax import HyperCLOVAXConfig
from transformers.models.hyperclovax.modeling_hyperclovax import HyperCLOVAXForCausalLM
from transformers.models.hyperclovax.modeling_hyperclovax import HyperCLOVAXModel
from transformers.models.hyperclovax.modeling_hyperclovax import HyperCLOVAXPreTrainedModel
from transformers.models.jais2.configuration_jais2 import Jais2Config
from transformers.models.jais2.modeling_jais2 import Jais2ForCausalLM
from transformers.models.jais2.modeling_jais2 import Jais2Model
from transformers.models.jais2.modeling_jais2 import Jais2PreTrainedModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.models.ministral.configuration_ministral import MinistralConfig
from transformers.models.ministral.modeling_ministral import MinistralForCausalLM
from transformers.models.ministral.modeling_ministral import MinistralModel
from transformers.models.ministral.modeling_ministral import MinistralPreTrainedModel
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import Ministral3ForCausalLM
from transformers.models.ministral3.modeling_ministral3 import Ministral3Model
from transformers.models.ministral3.modeling_ministral3 import Ministral3PreTrainedModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.mistral.modeling_mistral import MistralPreTrainedModel
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralModel
from transformers.models.mixtral.modeling_mixtral import MixtralPreTrainedModel
from transformers.models.nemotron.configuration_nemotron import NemotronConfig
from transformers.models.nemotron.modeling_nemotron import NemotronForCausalLM
from transformers.models.nemotron.modeling_nemotron import NemotronModel
from transformers.models.nemotron.modeling_nemotron import NemotronPreTrainedModel
from transformers.models.olmo.configuration_olmo import OlmoConfig
from transformers.models.olmo.modeling_olmo import OlmoForCausalLM
from transformers.models.olmo.modeling_olmo import OlmoModel
from transformers.models.olmo.modeling_olmo import OlmoPreTrainedModel
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
from transformers.models.seed_oss.configuration_seed_oss import SeedOssConfig
from transformers.models.seed_oss.modeling_seed_oss import SeedOssForCausalLM
from transformers.models.seed_oss.modeling_seed_oss import SeedOssModel
from transformers.models.seed_oss.modeling_seed_oss import SeedOssPreTrainedModel
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Model
from transformers.models.smollm3.modeling_smollm3 import SmolLM3PreTrainedModel
from transformers.models.stablelm.configuration_stablelm import StableLmConfig
from transformers.models.stablelm.modeling_stablelm import StableLmForCausalLM
from transformers.models.stablelm.modeling_stablelm import StableLmModel
from transformers.models.stablelm.modeling_stablelm import StableLmPreTrainedModel
from transformers.models.starcoder2.configuration_starcoder2 import Starcoder2Config
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2ForCausalLM
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2Model
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2PreTrainedModel
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

class GraniteMLAConfig(MLAConfigMixin, GraniteConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class GraniteMLAPreTrainedModel(MLAPreTrainedModelMixin, GranitePreTrainedModel):
    config: GraniteMLAConfig

class GraniteMLAModel(MLAModelMixin, GraniteMLAPreTrainedModel, GraniteModel):
    ...

class GraniteMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, GraniteMLAPreTrainedModel, GraniteForCausalLM):
    ...

class GraniteMLAForSequenceClassification(MLAForSequenceClassificationMixin, GraniteMLAPreTrainedModel):
    ...

class GraniteMLAForTokenClassification(MLAForTokenClassificationMixin, GraniteMLAPreTrainedModel):
    ...

class GraniteMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, GraniteMLAPreTrainedModel):
    ...

class Starcoder2MLAConfig(MLAConfigMixin, Starcoder2Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = True

class Starcoder2MLAPreTrainedModel(MLAPreTrainedModelMixin, Starcoder2PreTrainedModel):
    config: Starcoder2MLAConfig

class Starcoder2MLAModel(MLAModelMixin, Starcoder2MLAPreTrainedModel, Starcoder2Model):
    ...

class Starcoder2MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Starcoder2MLAPreTrainedModel, Starcoder2ForCausalLM):
    ...

class Starcoder2MLAForSequenceClassification(MLAForSequenceClassificationMixin, Starcoder2MLAPreTrainedModel):
    ...

class Starcoder2MLAForTokenClassification(MLAForTokenClassificationMixin, Starcoder2MLAPreTrainedModel):
    ...

class Starcoder2MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Starcoder2MLAPreTrainedModel):
    ...

class SeedOssMLAConfig(MLAConfigMixin, SeedOssConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = True

class SeedOssMLAPreTrainedModel(MLAPreTrainedModelMixin, SeedOssPreTrainedModel):
    config: SeedOssMLAConfig

class SeedOssMLAModel(MLAModelMixin, SeedOssMLAPreTrainedModel, SeedOssModel):
    ...

class SeedOssMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, SeedOssMLAPreTrainedModel, SeedOssForCausalLM):
    ...

class SeedOssMLAForSequenceClassification(MLAForSequenceClassificationMixin, SeedOssMLAPreTrainedModel):
    ...

class SeedOssMLAForTokenClassification(MLAForTokenClassificationMixin, SeedOssMLAPreTrainedModel):
    ...

class SeedOssMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, SeedOssMLAPreTrainedModel):
    ...

class ArceeMLAConfig(MLAConfigMixin, ArceeConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class ArceeMLAPreTrainedModel(MLAPreTrainedModelMixin, ArceePreTrainedModel):
    config: ArceeMLAConfig

class ArceeMLAModel(MLAModelMixin, ArceeMLAPreTrainedModel, ArceeModel):
    ...

class ArceeMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, ArceeMLAPreTrainedModel, ArceeForCausalLM):
    ...

class ArceeMLAForSequenceClassification(MLAForSequenceClassificationMixin, ArceeMLAPreTrainedModel):
    ...

class ArceeMLAForTokenClassification(MLAForTokenClassificationMixin, ArceeMLAPreTrainedModel):
    ...

class ArceeMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, ArceeMLAPreTrainedModel):
    ...

class GemmaMLAConfig(MLAConfigMixin, GemmaConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class GemmaMLAPreTrainedModel(MLAPreTrainedModelMixin, GemmaPreTrainedModel):
    config: GemmaMLAConfig

class GemmaMLAModel(MLAModelMixin, GemmaMLAPreTrainedModel, GemmaModel):
    ...

class GemmaMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, GemmaMLAPreTrainedModel, GemmaForCausalLM):
    ...

class GemmaMLAForSequenceClassification(MLAForSequenceClassificationMixin, GemmaMLAPreTrainedModel):
    ...

class GemmaMLAForTokenClassification(MLAForTokenClassificationMixin, GemmaMLAPreTrainedModel):
    ...

class GemmaMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, GemmaMLAPreTrainedModel):
    ...

class ApertusMLAConfig(MLAConfigMixin, ApertusConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class ApertusMLAPreTrainedModel(MLAPreTrainedModelMixin, ApertusPreTrainedModel):
    config: ApertusMLAConfig

class ApertusMLAModel(MLAModelMixin, ApertusMLAPreTrainedModel, ApertusModel):
    ...

class ApertusMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, ApertusMLAPreTrainedModel, ApertusForCausalLM):
    ...

class ApertusMLAForSequenceClassification(MLAForSequenceClassificationMixin, ApertusMLAPreTrainedModel):
    ...

class ApertusMLAForTokenClassification(MLAForTokenClassificationMixin, ApertusMLAPreTrainedModel):
    ...

class ApertusMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, ApertusMLAPreTrainedModel):
    ...

class HyperCLOVAXMLAConfig(MLAConfigMixin, HyperCLOVAXConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class HyperCLOVAXMLAPreTrainedModel(MLAPreTrainedModelMixin, HyperCLOVAXPreTrainedModel):
    config: HyperCLOVAXMLAConfig

class HyperCLOVAXMLAModel(MLAModelMixin, HyperCLOVAXMLAPreTrainedModel, HyperCLOVAXModel):
    ...

class HyperCLOVAXMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, HyperCLOVAXMLAPreTrainedModel, HyperCLOVAXForCausalLM):
    ...

class HyperCLOVAXMLAForSequenceClassification(MLAForSequenceClassificationMixin, HyperCLOVAXMLAPreTrainedModel):
    ...

class HyperCLOVAXMLAForTokenClassification(MLAForTokenClassificationMixin, HyperCLOVAXMLAPreTrainedModel):
    ...

class HyperCLOVAXMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, HyperCLOVAXMLAPreTrainedModel):
    ...

class CwmMLAConfig(MLAConfigMixin, CwmConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class CwmMLAPreTrainedModel(MLAPreTrainedModelMixin, CwmPreTrainedModel):
    config: CwmMLAConfig

class CwmMLAModel(MLAModelMixin, CwmMLAPreTrainedModel, CwmModel):
    ...

class CwmMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, CwmMLAPreTrainedModel, CwmForCausalLM):
    ...

class CwmMLAForSequenceClassification(MLAForSequenceClassificationMixin, CwmMLAPreTrainedModel):
    ...

class CwmMLAForTokenClassification(MLAForTokenClassificationMixin, CwmMLAPreTrainedModel):
    ...

class CwmMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, CwmMLAPreTrainedModel):
    ...

class MinistralMLAConfig(MLAConfigMixin, MinistralConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class MinistralMLAPreTrainedModel(MLAPreTrainedModelMixin, MinistralPreTrainedModel):
    config: MinistralMLAConfig

class MinistralMLAModel(MLAModelMixin, MinistralMLAPreTrainedModel, MinistralModel):
    ...

class MinistralMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, MinistralMLAPreTrainedModel, MinistralForCausalLM):
    ...

class MinistralMLAForSequenceClassification(MLAForSequenceClassificationMixin, MinistralMLAPreTrainedModel):
    ...

class MinistralMLAForTokenClassification(MLAForTokenClassificationMixin, MinistralMLAPreTrainedModel):
    ...

class MinistralMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, MinistralMLAPreTrainedModel):
    ...

class Dots1MLAConfig(MLAConfigMixin, Dots1Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class Dots1MLAPreTrainedModel(MLAPreTrainedModelMixin, Dots1PreTrainedModel):
    config: Dots1MLAConfig

class Dots1MLAModel(MLAModelMixin, Dots1MLAPreTrainedModel, Dots1Model):
    ...

class Dots1MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Dots1MLAPreTrainedModel, Dots1ForCausalLM):
    ...

class Dots1MLAForSequenceClassification(MLAForSequenceClassificationMixin, Dots1MLAPreTrainedModel):
    ...

class Dots1MLAForTokenClassification(MLAForTokenClassificationMixin, Dots1MLAPreTrainedModel):
    ...

class Dots1MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Dots1MLAPreTrainedModel):
    ...

class Jais2MLAConfig(MLAConfigMixin, Jais2Config):
    base_model_tp_plan: ClassVar
    attention_bias: bool = True

class Jais2MLAPreTrainedModel(MLAPreTrainedModelMixin, Jais2PreTrainedModel):
    config: Jais2MLAConfig

class Jais2MLAModel(MLAModelMixin, Jais2MLAPreTrainedModel, Jais2Model):
    ...

class Jais2MLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, Jais2MLAPreTrainedModel, Jais2ForCausalLM):
    ...

class Jais2MLAForSequenceClassification(MLAForSequenceClassificationMixin, Jais2MLAPreTrainedModel):
    ...

class Jais2MLAForTokenClassification(MLAForTokenClassificationMixin, Jais2MLAPreTrainedModel):
    ...

class Jais2MLAForQuestionAnswering(MLAForQuestionAnsweringMixin, Jais2MLAPreTrainedModel):
    ...

class OlmoMLAConfig(MLAConfigMixin, OlmoConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class OlmoMLAPreTrainedModel(MLAPreTrainedModelMixin, OlmoPreTrainedModel):
    config: OlmoMLAConfig

class OlmoMLAModel(MLAModelMixin, OlmoMLAPreTrainedModel, OlmoModel):
    ...

class OlmoMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, OlmoMLAPreTrainedModel, OlmoForCausalLM):
    ...

class OlmoMLAForSequenceClassification(MLAForSequenceClassificationMixin, OlmoMLAPreTrainedModel):
    ...

class OlmoMLAForTokenClassification(MLAForTokenClassificationMixin, OlmoMLAPreTrainedModel):
    ...

class OlmoMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, OlmoMLAPreTrainedModel):
    ...

class GraniteMoeMLAConfig(MLAConfigMixin, GraniteMoeConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class GraniteMoeMLAPreTrainedModel(MLAPreTrainedModelMixin, GraniteMoePreTrainedModel):
    config: GraniteMoeMLAConfig

class GraniteMoeMLAModel(MLAModelMixin, GraniteMoeMLAPreTrainedModel, GraniteMoeModel):
    ...

class GraniteMoeMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, GraniteMoeMLAPreTrainedModel, GraniteMoeForCausalLM):
    ...

class GraniteMoeMLAForSequenceClassification(MLAForSequenceClassificationMixin, GraniteMoeMLAPreTrainedModel):
    ...

class GraniteMoeMLAForTokenClassification(MLAForTokenClassificationMixin, GraniteMoeMLAPreTrainedModel):
    ...

class GraniteMoeMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, GraniteMoeMLAPreTrainedModel):
    ...

class GraniteMoeSharedMLAConfig(MLAConfigMixin, GraniteMoeSharedConfig):
    base_model_tp_plan: ClassVar
    attention_bias: bool = False

class GraniteMoeSharedMLAPreTrainedModel(MLAPreTrainedModelMixin, GraniteMoeSharedPreTrainedModel):
    config: GraniteMoeSharedMLAConfig

class GraniteMoeSharedMLAModel(MLAModelMixin, GraniteMoeSharedMLAPreTrainedModel, GraniteMoeSharedModel):
    ...

class GraniteMoeSharedMLAForCausalLM(MLAForCausalLMMixin, LatentCacheGenerationMixin, GraniteMoeSharedMLAPreTrainedModel, GraniteMoeSharedForCausalLM):
    ...

class GraniteMoeSharedMLAForSequenceClassification(MLAForSequenceClassificationMixin, GraniteMoeSharedMLAPreTrainedModel):
    ...

class GraniteMoeSharedMLAForTokenClassification(MLAForTokenClassificationMixin, GraniteMoeSharedMLAPreTrainedModel):
    ...

class GraniteMoeSharedMLAForQuestionAnswering(MLAForQuestionAnsweringMixin, GraniteMoeSharedMLAPreTrainedModel):
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
    attention_bias: bool = True

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
    attention_bias: bool = True

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
    attention_bias: bool = True

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
