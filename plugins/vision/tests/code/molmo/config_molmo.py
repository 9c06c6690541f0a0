"""A config with the fields of Molmo's own."""

from transformers import PreTrainedConfig


class MolmoConfig(PreTrainedConfig):
    model_type = "molmo"

    def __init__(self, hidden_size=64, num_hidden_layers=2, vocab_size=128, **kwargs):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = vocab_size
        self.use_cache = True
        super().__init__(**kwargs)
