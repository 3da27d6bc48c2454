"""`import scmoe.hf` registers the models of this project with transformers' Auto classes.

    import scmoe.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)      # of make export FORMAT=hf

It requires transformers. The code is that of the installed package: nothing in the folder is
executed, and trust_remote_code is not used.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from scmoe.datamodules.positioned import IGNORE
from scmoe.runs.hf_base import ScMoEConfig, ScMoEModel, ScMoEPreTrainedModel
from scmoe.weights.hf_config import OUR_MODEL_TYPE

__all__ = ["ScMoEConfig", "ScMoEForCausalLM", "ScMoEModel"]


class ScMoEForCausalLM(ScMoEPreTrainedModel, GenerationMixin):
    """The base model under `model`, and the logits of its head. Caches are those of transformers,
    except static ones."""

    # transformers' Trainer then passes num_items_in_batch, and does not divide the loss itself.
    accepts_loss_kwargs = True

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        self.model = ScMoEModel(config)
        self.post_init()

    def initialize_weights(self) -> None:
        """Draw the weights of the base model, and those that a subclass adds."""
        self.model.initialize_weights()
        super().initialize_weights()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits [B, S, V], and the loss, cache and hidden states that are asked for.

        Arguments that are not named here, and the errors, are those of ScMoEModel. labels: the ids,
        -100 where not counted. logits_to_keep: logits of this many last tokens (0: all), or of the
        tokens that a tensor names or masks, as in transformers. output_router_logits: also add
        aux_loss to the loss, with the config's weight. num_items_in_batch: counted labels of all
        batches of a step; the losses of these batches add up to the step's mean.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=True,
            **others,
        )
        kept_BSD = slice_logits_to_keep(output.last_hidden_state, logits_to_keep)
        logits_BSV = self.model.head(kept_BSD)
        loss = None
        if labels is not None:
            loss = self.loss_of(logits_BSV, labels, output.aux_loss, num_items_in_batch)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=output.aux_loss,
            logits=logits_BSV,
            cache=output.cache,
            hidden_states=output.hidden_states,
            router_logits=output.router_logits,
        )

    def loss_of(
        self,
        logits_BSV: Tensor,
        labels_BS: Tensor,
        aux_loss: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Return the loss of the next tokens, with the load-balance loss. Arguments are those of
        `forward`."""
        targets_N = labels_BS[:, 1:].flatten()
        wide_NV = logits_BSV[:, :-1].flatten(0, 1).float()
        counted = (targets_N != IGNORE).sum()
        nats = F.cross_entropy(wide_NV, targets_N, ignore_index=IGNORE, reduction="sum")
        loss = nats / counted.clamp(min=1)
        if aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * aux_loss
        if num_items_in_batch is not None:
            loss = loss * counted / num_items_in_batch
        return loss

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what transformers' generate_batch begins with: its paged cache is read by
        attention functions of transformers, which this model does not call."""
        raise ValueError(
            f"generate_batch is called, but a model of type {OUR_MODEL_TYPE} does not support"
            " continuous batching. Use generate with prompts that are padded on the left."
        )


AutoConfig.register(OUR_MODEL_TYPE, ScMoEConfig)
AutoModel.register(ScMoEConfig, ScMoEModel)
AutoModelForCausalLM.register(ScMoEConfig, ScMoEForCausalLM)
