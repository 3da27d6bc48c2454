"""The configuration of type scmoe, and its model without the output product, for transformers.

The weights have the names that they have in the network of this project, so a folder's names are
those of a checkpoint after `model.`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from scmoe.blocks.sublayers import keep_activations, recompute_activations
from scmoe.config.fields import Config
from scmoe.models.decoder import draw_weights, stream_after_blocks
from scmoe.moe.balance import integer_sums, load_balance_loss
from scmoe.moe.router import Router
from scmoe.moe.tokens import Routing
from scmoe.parallel.wire.wire import Wire
from scmoe.runs.hf_attention import has_packed_texts, seen_in_pass
from scmoe.training.assembly.model import build_network
from scmoe.weights.hf_config import OUR_MODEL_TYPE, our_config, scmoe_config, transformers_sizes

# Arguments that add nothing to the others and are ignored: `generate` passes its tokenizers, and
# collators that pack texts pass what follows from position_ids.
OF_GENERATION = {"tokenizer", "assistant_tokenizer"}
OF_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class ScMoEConfig(PretrainedConfig):
    """The configuration of a ScMoE model for transformers.

    scmoe: sections of our configuration, from which the network is built; None: defaults.
    output_router_logits: add the load-balance loss times router_aux_loss_coef to the loss.
    router_aux_loss_coef: None: that of the training; 0 without experts. use_cache: the default of a
    pass in evaluation mode. Sizes under transformers' names follow from `scmoe`; others are refused
    when a model is built.
    """

    model_type = OUR_MODEL_TYPE
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it: a folder has no code
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "cache",
        "past_key_values",
        "aux_loss",
        "router_logits",
    ]

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
        moe = self.ours().moe
        coef = moe.load_balance_coef if router_aux_loss_coef is None else router_aux_loss_coef
        self.router_aux_loss_coef = 0.0 if moe.architecture == "dense" else coef
        super().__init__(**{**self.sizes(), **kwargs})

    def ours(self) -> Config:
        return our_config({"model_type": OUR_MODEL_TYPE, "scmoe": self.scmoe}, "config.json")

    def sizes(self) -> dict[str, Any]:
        return transformers_sizes(self.ours())


@dataclass
class ScMoEModelOutput(MoeModelOutputWithPast):
    """What transformers' base models with experts return, and the load-balance loss."""

    aux_loss: Tensor | None = None


class ScMoEPreTrainedModel(PreTrainedModel):
    """What the base model and the causal model share; `base_model` has the weights."""

    config_class = ScMoEConfig
    config: ScMoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
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

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Mark tied weights as transformers does, except those that the folder has under none of
        their names."""
        tied = self.all_tied_weights_keys.items()
        absent = {first for name, first in tied if {name, first} <= loading_info.missing_keys}
        super().mark_tied_weights_as_initialized(loading_info)
        for name in absent:
            vars(self.get_parameter(name)).pop("_is_hf_initialized", None)
        loading_info.missing_keys |= absent

    def get_input_embeddings(self) -> Any:
        return self.base_model.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.tokens = value

    def get_output_embeddings(self) -> Any:
        return self.base_model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base_model.head = value

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
        base: Any = self.base_model
        keep_activations(base)
        if enable:
            chosen = nn.ModuleList(list(base.blocks)[::every_n_layers])
            recompute_activations(chosen, gradient_checkpointing_func)
        base.gradient_checkpointing = enable


class ScMoEModel(ScMoEPreTrainedModel):
    """The parts of the network of this project: `tokens`, `blocks`, `norm` and the rest. forward
    ends with the norm; `head`, the output product, is the causal model's to call."""

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
                f"attn_implementation is {config._attn_implementation}, but a model of type"
                f" {OUR_MODEL_TYPE} computes attention by torch's scaled_dot_product_attention"
                " only. Leave it out, or use sdpa."
            )
        self.gradient_checkpointing = False
        network = build_network(config.ours(), Wire())
        self.max_seq_len = network.max_seq_len
        self.halves = network.halves
        self.tokens = network.tokens
        self.positions = network.positions
        self.dropout = network.dropout
        self.blocks = network.blocks
        self.norm = network.norm
        self.head = network.head
        first_names = {p: name for name, p in self.named_parameters()}
        all_names = self.named_parameters(remove_duplicate=False)
        self._tied_weights_keys = {
            name: first_names[p] for name, p in all_names if name != first_names[p]
        }
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return names of shared parameters, each with its first name, to which transformers ties
        it: heads, norms of taps, MoE modules (DGMoE-Share)."""
        return dict(self._tied_weights_keys or {})

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw weights as a training does, except those that transformers has read and marked. A
        second call draws nothing, so a subclass may call post_init again."""
        if getattr(self, "_is_hf_initialized", False):
            return
        read = {
            p for p in self.parameters() if p.is_meta or getattr(p, "_is_hf_initialized", False)
        }
        if read < set(self.parameters()):
            from_folder = [(p, p.clone()) for p in read]
            draw_weights(self, int(torch.randint(2**62, (), device="cpu")))
            for p, weight in from_folder:
                p.copy_(weight)
        self._is_hf_initialized = True

    def _init_weights(self, module: nn.Module) -> None:
        """Draw nothing: initialize_weights draws all weights together."""

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **others: Any,
    ) -> ScMoEModelOutput:
        """Return the stream after the norm as last_hidden_state [B, S, D], and the cache, hidden
        states, router logits and load-balance loss that are asked for.

        input_ids: [B, S]. inputs_embeds: their embeddings [B, S, D] instead, without positions.
        attention_mask: [B, tokens in the cache + new ones], 0 at padding, on either side of a text.
        position_ids: [B or 1, S]; None: they follow from the mask. Without a mask, a text begins
        where they do not go up by 1, and sees no other text. cache: has the tokens before; new ones
        are appended. use_cache: make a cache; None: as the config says in evaluation mode, False in
        training mode and for several texts in a row. output_hidden_states: return the stream before
        the first layer and after each layer, the last one after the norm. output_router_logits:
        return the load-balance loss as aux_loss, and for each routing the logits [B S, E] as
        router_logits, whose softmax are the experts' shares. Raises ValueError for every other
        argument that is set, for a mask or positions of another shape, for a static cache, and for
        a cache with gradient checkpointing or with several texts in a row.
        """
        unread = OF_GENERATION if position_ids is None else OF_GENERATION | OF_PACKING
        for name, value in others.items():
            if value is not None and value is not False and name not in unread:
                raise ValueError(
                    f"{name} is given, but a model of type {OUR_MODEL_TYPE} does not read it."
                    " Leave it out."
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
        cache = self.cache_for(cache, use_cache, has_packed_texts(attention_mask, position_ids))
        seen: Any  # it does what a KVCache does
        seen, mask_BS = seen_in_pass(cache, attention_mask, position_ids, tokens)
        with (
            recorded_states(self, output_hidden_states is True) as states,
            recorded_logits(self, output_router_logits) as router_logits,
        ):
            x_BSD, stats = stream_after_blocks(self, tokens, mask_BS, seen)
            x_BSD = self.norm(x_BSD)

        aux_loss = None
        of_routings: Any = None
        if stats and output_router_logits:
            aux_loss = load_balance_loss(stats, integer_sums(stats))
            of_routings = tuple(router_logits)
        return ScMoEModelOutput(
            last_hidden_state=x_BSD,
            cache=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
            router_logits=of_routings,
            aux_loss=aux_loss,
        )

    def cache_for(
        self, cache: Cache | None, use_cache: bool | None, is_packed: bool
    ) -> Cache | None:
        """Return the cache of a pass: the given one, a new one, or None."""
        if cache is not None and cache.is_compileable:
            raise ValueError(
                "The cache is static, which a model of type scmoe does not support. Use a"
                " DynamicCache."
            )
        if is_packed and (use_cache or cache is not None):
            raise ValueError(
                "position_ids hold several texts in a row, which a cache does not keep apart. Use"
                " use_cache=False, or give an attention_mask."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not is_packed
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputes and (use_cache or cache is not None):
            raise ValueError(
                "A cache is asked for with gradient checkpointing, whose backward would append the"
                " same tokens again. Use use_cache=False in training."
            )
        return DynamicCache(config=self.config) if use_cache and cache is None else cache


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
            for mlp in block.sublayers[1:-1:2]:  # each but the last ends a layer
                handles.append(mlp.register_forward_hook(note_output))
            if block is not blocks[-1]:
                handles.append(block.register_forward_hook(note_output_of_block))
        handles.append(network.norm.register_forward_hook(note_output))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_logits(network: nn.Module, show: bool) -> Iterator[list[Tensor]]:
    """Yield a list that a pass fills with the logits of each routing [T, E], noise included.

    For scores that are no softmax of the logits, they are the logarithms of the shares by which the
    load-balance loss counts. show: False: the list stays empty.
    """
    logits: list[Tensor] = []
    handles = []

    def note(router: Any, inputs: Any, routing: Routing) -> None:
        scoring = router.scoring
        shares_TE = scoring.shares(routing.scores_TE)
        logits.append(routing.logits_TE if scoring.sums_to_one else shares_TE.log())

    if show:
        routers = [module for module in network.modules() if isinstance(module, Router)]
        handles += [router.register_forward_hook(note) for router in routers]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()
