"""`import scmoe.hf` makes transformers' Auto classes know the models of this project (requires transformers).

    import scmoe.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)      # of make export FORMAT=hf

The code is that of the installed package; nothing of the folder is executed, and trust_remote_code is not used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from scmoe.datamodules.positioned import IGNORE
from scmoe.moe.balance import integer_sums, load_balance_loss
from scmoe.parallel.mesh import ParallelContext
from scmoe.runs.hf_folder import OURS, our_config
from scmoe.training.assembly.model import build_network


class ScMoEConfig(PretrainedConfig):
    """scmoe: sections of our own configuration, from which the network is built.

    output_router_logits: add the load-balance loss times router_aux_loss_coef (None: that of the training) to the loss.
    """

    model_type = OURS

    def __init__(
        self,
        scmoe: dict[str, Any] | None = None,
        output_router_logits: bool = False,
        router_aux_loss_coef: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.scmoe = scmoe or {}
        self.output_router_logits = output_router_logits
        coef = self.scmoe.get("moe", {}).get("load_balance_coef", 0.01)
        self.router_aux_loss_coef = coef if router_aux_loss_coef is None else router_aux_loss_coef
        super().__init__(**kwargs)


class PaddedCache:
    """Stands where the model reads a KVCache; keys and values are in transformers' cache, or only in this pass.

    mask_BL: of the tokens before and of the new ones, the last seq_len. False: padding, anywhere: no other token sees
    it, and it takes no position. causal: there are no tokens before, and no padding precedes a token.
    """

    def __init__(self, cache: Cache | None, mask_BL: Tensor, seq_len: int, causal: bool) -> None:
        self.cache, self.layer = cache, 0
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        self.longest, self.positions_BS = int(positions_BL.max()) + 1, positions_BL[:, -seq_len:]
        keys_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        queries_S1 = keys_L[-seq_len:, None]
        # padding sees itself, because a softmax over nothing is not a number
        seen_B1SL = mask_BL[:, None, None] & (keys_L < queries_S1) | (keys_L == queries_S1)
        self.seen: dict[str, Any] = {"is_causal": True} if causal else {"attn_mask": seen_B1SL}

    def extend(self, attention: nn.Module, k_BHSd: Tensor, v_BHSd: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """As KVCache.extend. Attention modules are called in the order of the layers."""
        if self.cache is not None:
            k_BHSd, v_BHSd = self.cache.update(k_BHSd, v_BHSd, self.layer)
        self.layer += 1
        return k_BHSd, v_BHSd, self.seen


class ScMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The network of this project under `model`. Caches are transformers' own, except static ones."""

    config_class = ScMoEConfig
    config: ScMoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # transformers' Trainer gives num_items_in_batch, and does not divide the loss itself
    _tied_weights_keys = {"model.head.weight": "model.tokens.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        content = {"model_type": OURS, "scmoe": config.scmoe}
        self.model: Any = build_network(our_config(content, "config.json"), ParallelContext())
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw weights as a training does, except those that transformers has read: it marks them."""
        read = {p for p in self.model.parameters() if p.is_meta or getattr(p, "_is_hf_initialized", False)}
        if read < set(self.model.parameters()):
            of_folder = [(p, p.clone()) for p in read]
            self.model.init_weights(int(torch.randint(2**62, (), device="cpu")))
            for p, weight in of_folder:
                p.copy_(weight)

    def get_input_embeddings(self) -> Any:
        return self.model.tokens

    def get_output_embeddings(self) -> Any:
        return self.model.head

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_router_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> MoeCausalLMOutputWithPast:
        """attention_mask: [B, tokens in the cache + new ones], 0 at padding, which may be on either side of a text.

        labels: input_ids, -100 where not counted. logits_to_keep: logits of this many last tokens; 0: all.
        output_router_logits: return the load-balance loss as aux_loss, and add it to the loss with the config's weight.
        num_items_in_batch: counted labels of all batches of a step, whose losses then add up to their mean.
        Raises ValueError for every other argument that is set, for a mask of another shape and for a static cache.
        """
        if unread := [name for name, value in others.items() if value is not None and value is not False]:
            raise ValueError(f"{unread[0]} is given, but a model of type {OURS} does not read it. Leave it out.")
        if cache is not None and cache.is_compileable:
            raise ValueError("The cache is static, which a model of type scmoe does not support. Use a DynamicCache.")
        batch_size, seq_len = input_ids.shape
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        size = (batch_size, past + seq_len)
        mask_BL = input_ids.new_ones(size).bool() if attention_mask is None else attention_mask.bool()
        if mask_BL.shape != size:
            raise ValueError(
                f"attention_mask has shape {tuple(mask_BL.shape)}, but it must be {size}: texts, all tokens"
            )
        causal = not past and not bool((mask_BL[:, 1:] & ~mask_BL[:, :-1]).any())
        padded = None if cache is None and causal else PaddedCache(cache, mask_BL, seq_len, causal)
        mask_BS = None if bool(mask_BL.all()) else mask_BL[:, -seq_len:]
        last_B = input_ids.new_full((batch_size,), seq_len - 1) if logits_to_keep == 1 else None
        logits_BSV, stats = self.model(input_ids, mask_BS, padded, last_B)
        logits_BSV, loss, aux_loss = logits_BSV[:, -logits_to_keep:], None, None
        if stats and (self.config.output_router_logits if output_router_logits is None else output_router_logits):
            aux_loss = load_balance_loss(stats, integer_sums(stats))
        if labels is not None:
            targets_N, wide_NV = labels[:, 1:].flatten(), logits_BSV[:, :-1].flatten(0, 1).float()
            counted = (targets_N != IGNORE).sum()
            loss = F.cross_entropy(wide_NV, targets_N, ignore_index=IGNORE, reduction="sum") / counted.clamp(min=1)
            loss = loss if aux_loss is None else loss + self.config.router_aux_loss_coef * aux_loss
            loss = loss if num_items_in_batch is None else loss * counted / num_items_in_batch
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits_BSV, cache=cache)


AutoConfig.register(OURS, ScMoEConfig)
AutoModelForCausalLM.register(ScMoEConfig, ScMoEForCausalLM)
