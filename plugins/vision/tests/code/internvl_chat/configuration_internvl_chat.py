"""A config with the fields of InternVL's own."""

from transformers import PreTrainedConfig, Qwen2Config

from .modeling_internlm2 import InternLM2Config


class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, select_layer=-1, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = PreTrainedConfig(**(vision_config or {}))
        llm_config = llm_config or {}
        own = llm_config.get("architectures") == ["InternLM2ForCausalLM"]
        self.llm_config = (InternLM2Config if own else Qwen2Config)(**llm_config)
        self.select_layer = select_layer

    def to_dict(self):
        values = super().to_dict()
        values["vision_config"] = self.vision_config.to_dict()
        values["llm_config"] = self.llm_config.to_dict()
        return values
