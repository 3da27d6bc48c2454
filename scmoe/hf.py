"""`import scmoe.hf` registers the models of this project with transformers' Auto classes.

    import scmoe.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)      # of make export FORMAT=hf

It requires transformers. The code is that of the installed package: nothing in the folder is
executed, and trust_remote_code is not used.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from scmoe.blocks.kv_cache import CAUSAL, Visible
from scmoe.blocks.sublayers import keep_activations, recompute_activations
from scmoe.config.fields import Config
from scmoe.datamodules.positioned import IGNORE
from scmoe.moe.balance import integer_sums, load_balance_loss
from scmoe.parallel.wire.wire import Wire
from scmoe.runs.hf_config import OURS, our_config, scmoe_config, sizes_of
from scmoe.training.assembly.model import build_network


class ScMoEConfig(PretrainedConfig):
    """The configuration of a ScMoE model for transformers.

    scmoe: sections of our configuration, from which the network is built; None: defaults.
    output_router_logits: add the load-balance loss times router_aux_loss_coef to the loss.
    router_aux_loss_coef: None: that of the training. use_cache: the default of a pass in evaluation
    mode. Sizes under transformers' names follow from `scmoe`; others are refused when a model is
    built.
    """

    model_type = OURS
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        scmoe: dict[str, Any] | None = None,
        output_router_logits: bool = False,
        router_aux_loss_coef: float | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.scmoe = copy.deepcopy(scmoe) if scmoe else scmoe_config(Config())["scmoe"]
        self.output_router_logits = output_router_logits
        self.use_cache = use_cache
        coef = self.scmoe.get("moe", {}).get("load_balance_coef", 0.01)
        self.router_aux_loss_coef = coef if router_aux_loss_coef is None else router_aux_loss_coef
        super().__init__(**{**self.sizes(), **kwargs})

    def ours(self) -> Config:
        return our_config({"model_type": OURS, "scmoe": self.scmoe}, "config.json")

    def sizes(self) -> dict[str, Any]:
        return sizes_of(self.ours())


class PaddedCache:
    """What the model reads in place of a KVCache. Keys and values are in transformers' cache, or
    only in this pass.

    mask_BL: of the earlier tokens and of the new ones, which are the last seq_len. False: padding,
    at any place: no other token attends to it, and it takes no position. causal: there are no
    earlier tokens, and no padding precedes a token.
    """

    def __init__(self, cache: Cache | None, mask_BL: Tensor, seq_len: int, causal: bool) -> None:
        self.cache = cache
        self.layer = 0
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        self.longest = int(positions_BL.max()) + 1
        self.positions_BS = positions_BL[:, -seq_len:]
        keys_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        queries_S1 = keys_L[-seq_len:, None]
        # Padding attends to itself, because a softmax over nothing is not a number.
        mask_B1SL = mask_BL[:, None, None] & (keys_L < queries_S1) | (keys_L == queries_S1)
        self.visible = CAUSAL if causal else Visible(mask_B1SL=mask_B1SL)

    def extend(
        self, attention: nn.Module, k_BHSd: Tensor, v_BHSd: Tensor
    ) -> tuple[Tensor, Tensor, Visible]:
        """Return keys, values and mask as KVCache.extend does. Attention modules call it in the
        order of the layers."""
        if self.cache is not None:
            k_BHSd, v_BHSd = self.cache.update(k_BHSd, v_BHSd, self.layer)
        self.layer += 1
        return k_BHSd, v_BHSd, self.visible


class ScMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The network of this project under `model`. Caches are those of transformers, except static
    ones."""

    config_class = ScMoEConfig
    config: ScMoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    # transformers' Trainer then passes num_items_in_batch, and does not divide the loss itself.
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [  # noqa: RUF012
        "DenseBlock",
        "FarSkipDenseBlock",
        "TopKBlock",
        "SharedExpertBlock",
        "ShortcutBlock",
        "FarSkipBlock",
        "DoubleGateBlock",
    ]
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        for name, value in config.sizes().items():
            if (declared := getattr(config, name, value)) != value:
                raise ValueError(
                    f"config.{name} is {declared}, but config.scmoe makes it {value}. Change the"
                    " settings in config.scmoe."
                )
        if config._attn_implementation != "sdpa":
            raise ValueError(
                f"attn_implementation is {config._attn_implementation}, but a model of type {OURS}"
                " computes attention by torch's scaled_dot_product_attention only. Leave it out,"
                " or use sdpa."
            )
        self.gradient_checkpointing = False
        self.model: Any = build_network(config.ours(), Wire())
        first_names = {p: f"model.{name}" for name, p in self.model.named_parameters()}
        all_names = self.model.named_parameters(prefix="model", remove_duplicate=False)
        self._tied_weights_keys = {
            name: first_names[p] for name, p in all_names if name != first_names[p]
        }
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return names of shared parameters, each with its first name, to which transformers ties
        it: heads, norms of taps, MoE modules (DGMoE-Share)."""
        return dict(self._tied_weights_keys or {})

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Mark tied weights as transformers does, except those that the folder has under none of
        their names."""
        tied = self.all_tied_weights_keys.items()
        absent = {first for name, first in tied if {name, first} <= loading_info.missing_keys}
        super().mark_tied_weights_as_initialized(loading_info)
        for name in absent:
            vars(self.get_parameter(name)).pop("_is_hf_initialized", None)
        loading_info.missing_keys |= absent

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw weights as a training does, except those that transformers has read and marked."""
        read = {
            p
            for p in self.model.parameters()
            if p.is_meta or getattr(p, "_is_hf_initialized", False)
        }
        if read < set(self.model.parameters()):
            from_folder = [(p, p.clone()) for p in read]
            self.model.init_weights(int(torch.randint(2**62, (), device="cpu")))
            for p, weight in from_folder:
                p.copy_(weight)

    def get_input_embeddings(self) -> Any:
        return self.model.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.tokens = value

    def get_output_embeddings(self) -> Any:
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize as transformers does. The settings follow, so that a saved folder can be read."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.scmoe["data"]["vocab_size"] = self.config.vocab_size
        return embeddings

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,  # counts blocks, also those of two layers
    ) -> None:
        """Recompute in backward what trainer.recompute does, which is not the routing. transformers
        calls it."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant is True, which is not supported. Use use_reentrant=False."
            )
        keep_activations(self.model)
        if enable:
            chosen = nn.ModuleList(list(self.model.blocks)[::every_n_layers])
            recompute_activations(chosen, gradient_checkpointing_func)
        self.gradient_checkpointing = enable

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits [B, S, V], and the loss, cache and hidden states that are asked for.

        input_ids: [B, S]. inputs_embeds: their embeddings [B, S, D] instead, without positions.
        attention_mask: [B, tokens in the cache + new ones], 0 at padding, on either side of a text.
        labels: the ids, -100 where not counted. cache: has the tokens before; new ones are
        appended. use_cache: make a cache; None: as the config says in evaluation mode, False in
        training mode. logits_to_keep: logits of this many last tokens; 0: all.
        output_hidden_states: return the stream before the first layer and after each layer, the
        last one after the norm. output_router_logits: return the load-balance loss as aux_loss, and
        add it to the loss with the config's weight. num_items_in_batch: counted labels of all
        batches of a step, whose losses then add up to their mean. Raises ValueError for every other
        argument that is set, for a mask of another shape, for a static cache and for a cache with
        gradient checkpointing.
        """
        unread = [name for name, v in others.items() if v is not None and v is not False]
        if unread:
            raise ValueError(
                f"{unread[0]} is given, but a model of type {OURS} does not read it. Leave it out."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Both or none of input_ids and inputs_embeds are given. Give one of them."
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if not isinstance(output_hidden_states, bool | None):
            raise ValueError(
                f"output_hidden_states is {output_hidden_states}, allowed: True (all layers), False"
            )

        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        batch_size, seq_len = tokens.shape[:2]
        cache = self.cache_for(cache, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        mask_BL = whole_mask(attention_mask, (batch_size, past + seq_len), tokens.device)
        causal = not past and not bool((mask_BL[:, 1:] & ~mask_BL[:, :-1]).any())
        padded = None if cache is None and causal else PaddedCache(cache, mask_BL, seq_len, causal)
        mask_BS = None if bool(mask_BL.all()) else mask_BL[:, -seq_len:]
        last_B = None
        if logits_to_keep == 1 and not output_hidden_states:
            last_B = torch.full((batch_size,), seq_len - 1, device=tokens.device)

        with recorded_states(self.model, output_hidden_states is True) as states:
            logits_BSV, stats = self.model(tokens, mask_BS, padded, last_B)
        logits_BSV = logits_BSV[:, -logits_to_keep:]

        aux_loss = None
        if stats and output_router_logits:
            aux_loss = load_balance_loss(stats, integer_sums(stats))
        loss = None
        if labels is not None:
            loss = self.loss_of(logits_BSV, labels, aux_loss, num_items_in_batch)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits_BSV,
            cache=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
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

    def cache_for(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """Return the cache of a pass: the given one, a new one, or None."""
        if cache is not None and cache.is_compileable:
            raise ValueError(
                "The cache is static, which a model of type scmoe does not support. Use a"
                " DynamicCache."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputes and (use_cache or cache is not None):
            raise ValueError(
                "A cache is asked for with gradient checkpointing, whose backward would append the"
                " same tokens again. Use use_cache=False in training."
            )
        return DynamicCache(config=self.config) if use_cache and cache is None else cache


def whole_mask(
    attention_mask: Tensor | None, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Return the mask [B, L] of all tokens, True at tokens.

    Raises ValueError if it has another shape than `size`.
    """
    if attention_mask is None:
        return torch.ones(size, dtype=torch.bool, device=device)
    if attention_mask.shape != size:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but it must be {size}: texts,"
            " all tokens"
        )
    return attention_mask.bool()


@contextmanager
def recorded_states(network: Any, show: bool) -> Iterator[list[Tensor]]:
    """Yield a list that a pass fills with its hidden states.

    They are the embeddings, then the stream after each layer, the last one after the norm. A block
    of two layers also adds the stream after its MLP. show: False: the list stays empty.
    """
    states: list[Tensor] = []
    handles = []

    def note_input(_: nn.Module, inputs: Any) -> None:
        states.append(inputs[0])

    def note_output(_: nn.Module, inputs: Any, y_BSD: Tensor) -> None:
        states.append(y_BSD)

    def note_output_of_block(_: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0])

    if show:
        blocks = list(network.blocks)
        handles.append(blocks[0].register_forward_pre_hook(note_input))
        for block in blocks:
            if len(block.sublayers) == 3:
                handles.append(block.sublayers[1].register_forward_hook(note_output))
            if block is not blocks[-1]:
                handles.append(block.register_forward_hook(note_output_of_block))
        handles.append(network.norm.register_forward_hook(note_output))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


AutoConfig.register(OURS, ScMoEConfig)
AutoModelForCausalLM.register(ScMoEConfig, ScMoEForCausalLM)
