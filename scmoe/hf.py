"""`import scmoe.hf` makes transformers' Auto classes know the models of this project (requires transformers).

    import scmoe.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)      # of make export FORMAT=hf

The code is that of the installed package; nothing of the folder is executed, and trust_remote_code is not used.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from scmoe.parallel.mesh import ParallelContext
from scmoe.runs.hf_config import OURS, our_config
from scmoe.training.assembly.model import build_network

IGNORE = -100


class ScMoEConfig(PretrainedConfig):
    """scmoe: sections of our own configuration, from which the network is built."""

    model_type = OURS

    def __init__(self, scmoe: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.scmoe = scmoe or {}
        super().__init__(**kwargs)


class ScMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The network of this project under `model`. It keeps no cache of keys and values: generation reads the whole text
    again for each token."""

    config_class = ScMoEConfig
    config: ScMoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {"model.head.weight": "model.tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        content = {"model_type": OURS, "scmoe": config.scmoe}
        self.model: Any = build_network(our_config(content, "config.json"), ParallelContext())
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Leave weights as they are: they come from the folder."""

    def get_input_embeddings(self) -> Any:
        return self.model.tokens

    def get_output_embeddings(self) -> Any:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutput:
        """attention_mask: 0 at padding, which must be at the end of a text. labels: input_ids, -100 where not counted.

        Raises ValueError for padding before or within a text, which would shift its positions.
        """
        mask_BS = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        if mask_BS is not None and bool((mask_BS[:, 1:] & ~mask_BS[:, :-1]).any()):
            raise ValueError("attention_mask has padding before tokens, allowed: at the end; set padding_side='right'")
        logits_BSV = self.model(input_ids, mask_BS).logits_BSV
        loss = None
        if labels is not None:
            targets, wide = labels[:, 1:].flatten(), logits_BSV[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(wide, targets, ignore_index=IGNORE)
        return CausalLMOutput(loss=loss, logits=logits_BSV)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return what forward reads of the whole text so far: there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoConfig.register(OURS, ScMoEConfig)
AutoModelForCausalLM.register(ScMoEConfig, ScMoEForCausalLM)
