"""Bugs that were made before, here or elsewhere, as one-line changes of the source, each with the tests that catch it.

`python -m experiments.mutate` puts them back one at a time, in a copy of the tree. A change replaces text that occurs
exactly once in its file; tests/unit/test_mutants.py notices when it no longer does.
"""

from __future__ import annotations

from typing import NamedTuple

UNIT, DIST = "tests/unit", "tests/distributed"
EP = f"{DIST}/test_negative_controls.py::test_nothing_broken_is_equal"  # two ranks against one, all gradients
DP = f"{DIST}/test_strategy.py::test_in_another_layout_a_resumed_run_goes_the_same_way[2-ep_sizes0]"
ORACLE = f"{UNIT}/test_reference_equality.py"
KILLED = f"{UNIT}/test_durable.py::test_killed_at_any_call_the_old_one_or_the_new_one_is_there"
MOE, PARALLEL, DATA = "scmoe/moe", "scmoe/parallel", "datamodules"


class Mutant(NamedTuple):
    """fault: its number in the table of faults (docs/faults.md); 0: of the architecture, not of its running."""

    name: str
    fault: int
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    # ------------------------------------------------------------------ checkpoints
    Mutant(
        "commit-by-copying",
        1,
        f"{PARALLEL}/durable.py",
        "    os.rename(partial, path)\n",
        "    shutil.copytree(partial, path)\n    shutil.rmtree(partial)\n",
        (KILLED,),
    ),
    Mutant(
        "old-checkpoint-removed-first",
        3,
        f"{PARALLEL}/durable.py",
        "        os.rename(path, old)  #",
        "        shutil.rmtree(path)  #",
        (KILLED,),
    ),
    Mutant(
        "manifest-checks-sizes-alone",
        5,
        f"{PARALLEL}/durable.py",
        " or fingerprint(path / name) != expected:",
        ":",
        (f"{UNIT}/test_durable.py::test_any_flipped_bit_is_found",),
    ),
    Mutant(
        "manifest-unsealed",
        5,
        f"{PARALLEL}/durable.py",
        '        sealed = _seal({"step": manifest["step"], "files": manifest["files"]}).encode() == text\n',
        '        sealed = {"step", "files"} <= manifest.keys()\n',
        (f"{UNIT}/test_durable.py::test_any_flipped_bit_is_found",),
    ),
    Mutant(
        "foreign-shards-let-in",
        2,
        f"{PARALLEL}/durable.py",
        'sorted(present ^ manifest["files"].keys())',
        'sorted(manifest["files"].keys() - present)',
        (f"{UNIT}/test_durable.py::test_a_shard_of_another_save_is_refused",),
    ),
    Mutant(
        "sweep-leaves-partial-ones",
        6,
        f"{PARALLEL}/durable.py",
        "        shutil.rmtree(partial)\n",
        "        partial.exists()\n",
        (KILLED,),
    ),
    Mutant(
        "sweep-removes-what-was-moved-aside",
        1,
        f"{PARALLEL}/durable.py",
        "            os.rename(aside, path)\n",
        "            shutil.rmtree(aside)\n",
        (KILLED,),
    ),
    Mutant(
        "experts-saved-by-rank",
        10,
        f"{PARALLEL}/checkpoint.py",
        "[Replicate(), Shard(0)]",
        "[Replicate(), Replicate()]",
        (DP,),
    ),
    Mutant(
        "moments-saved-by-rank",
        9,
        f"{PARALLEL}/checkpoint.py",
        "    return isinstance(value, Tensor) and value.shape == p.shape\n",
        "    return False\n",
        (DP,),
    ),
    # ------------------------------------------------------------------ resuming
    Mutant(
        "data-position-forgotten",
        8,
        f"{DATA}/sequences.py",
        '        self.consumed_samples = state_dict["consumed_samples"]\n',
        "        self.consumed_samples = 0\n",
        (f"{UNIT}/test_text.py::test_resume_goes_on_exactly_with_another_world_size[0]",),
    ),
    Mutant(
        "random-state-forgotten",
        8,
        f"{PARALLEL}/checkpoint.py",
        '    torch.set_rng_state(states["host"])\n',
        '    assert "host" in states\n',
        (f"{DIST}/test_strategy.py::test_in_the_same_layout_a_resumed_run_is_the_straight_run[2-null]",),
    ),
    Mutant(
        "ranks-read-the-same-samples",
        11,
        f"{DATA}/order.py",
        "np.arange(first + self.rank, first + self.micro_batch, self.world)",
        "np.arange(first, first + self.micro_batch, self.world)",
        (f"{UNIT}/test_text.py::test_every_world_size_sees_the_same_global_batches",),
    ),
    Mutant(
        "last-validation-batch-dropped",
        16,
        f"{DATA}/order.py",
        "-(-num_samples // (batch * world))",
        "num_samples // (batch * world)",
        (f"{UNIT}/test_text.py::test_validation_covers_every_target_once",),
    ),
    # ------------------------------------------------------------------ transfers
    Mutant(
        "no-wait-forward",
        18,
        f"{PARALLEL}/all_to_all.py",
        "        transfer.finish()\n        return rows.view_as(rows)\n",
        "        return rows.view_as(rows)\n",
        (f"{DIST}/test_negative_controls.py::test_late_transfers_change_no_bit",),
    ),
    Mutant(
        "no-wait-backward",
        18,
        f"{PARALLEL}/all_to_all.py",
        "        transfer.finish()\n        grad, transfer.grad",
        "        grad, transfer.grad",
        (f"{DIST}/test_negative_controls.py::test_late_transfers_change_no_bit",),
    ),
    Mutant(
        "backward-waits-where-it-sends",
        0,
        f"{PARALLEL}/all_to_all.py",
        "        transfer.grad = transfer.launch(grad, transfer.received, transfer.sent)\n",
        "        transfer.grad = transfer.launch(grad, transfer.received, transfer.sent)\n"
        "        transfer.work.wait()\n",
        (f"{DIST}/test_all_to_all.py::test_a_transfer_hides_behind_the_work_forward_and_backward",),
    ),
    Mutant(
        "rows-left-grouped-by-sender",
        0,
        f"{PARALLEL}/dispatcher.py",
        "labels.repeat_interleave(counts_from_e.flatten()).argsort(stable=True)",
        "torch.arange(sum(received), device=labels.device)",
        (EP,),
    ),
    Mutant(
        "ceiling-of-the-total",
        31,
        f"{PARALLEL}/dispatcher.py",
        "fair = sum(received) / len(received)",
        "fair = sum(received)",
        ("tests/faults/test_guards.py::test_31_the_ceiling_is_of_the_fair_share",),
    ),
    # ------------------------------------------------------------------ gradients over ranks
    Mutant(
        "no-1/EP",
        21,
        f"{PARALLEL}/reducer.py",
        "return grad / self.context.ep_size",
        "return grad",
        (EP,),
    ),
    Mutant(
        "no-mean-over-EDP",
        21,
        f"{PARALLEL}/reducer.py",
        "            flat /= self.context.edp_size\n",
        "",
        (DP,),
    ),
    Mutant(
        "no_sync-ignored",
        0,
        f"{PARALLEL}/strategy.py",
        "with super().block_backward_sync(), self.reducer.no_sync():",
        "with super().block_backward_sync():",
        (f"{DIST}/test_strategy.py::test_expert_gradients_are_sent_once_a_step[2]",),
    ),
    Mutant(
        "experts-given-to-DDP",
        25,
        f"{PARALLEL}/strategy.py",
        "        names.update(name for name, _ in expert_parameters(self.module))\n",
        "",
        (EP,),
    ),
    Mutant(
        "norm-of-own-shards",
        22,
        f"{PARALLEL}/expert_parallel.py",
        "get_total_norm(sharded).square() / context.edp_size",
        "get_total_norm(sharded).square() / context.world_size",
        (EP,),
    ),
    Mutant(
        "router-gradient-lost",
        23,
        f"{MOE}/stream.py",
        "decode(rows_RD, state.routing.topk_weights_TK, state.layout)",
        "decode(rows_RD, state.routing.topk_weights_TK.detach(), state.layout)",
        (f"{ORACLE}::test_architecture_equals_oracle",),
    ),
    Mutant(
        "balance-loss-by-topology",
        24,
        f"{MOE}/balance.py",
        "score_sums_LE * world_size / tokens_L",
        "score_sums_LE / tokens_L",
        (f"{UNIT}/test_balance.py::test_mean_over_ranks_is_the_loss_of_the_global_batch",),
    ),
    Mutant(
        "balance-loss-of-own-tokens",
        24,
        "scmoe/training/module.py",
        "load_balance_loss(stats, load_sums_LE2, world_size)",
        "load_balance_loss(stats, integer_sums(stats), 1)",
        (EP,),
    ),
    Mutant(
        "update-with-a-norm-that-is-not-finite",
        27,
        f"{PARALLEL}/guard.py",
        "        if torch.isfinite(norm):\n",
        "        if norm.numel() == 1:\n",
        ("tests/faults/test_guards.py::test_27_one_process_too",),
    ),
    # ------------------------------------------------------------------ seeding
    Mutant(
        "experts-drawn-by-local-id",
        25,
        f"{MOE}/experts.py",
        "in zip(self.expert_ids, weight, strict=True):",
        "in enumerate(weight):",
        (f"{UNIT}/test_experts.py::test_weights_do_not_depend_on_the_ep_degree",),
    ),
    Mutant(
        "experts-drawn-alike",
        25,
        f"{MOE}/experts.py",
        'f"{key}/{name}/{expert}"',
        'f"{key}/{name}"',
        (f"{UNIT}/test_experts.py::test_every_expert_tensor_and_key_differs",),
    ),
    Mutant(
        "dense-weights-drawn-by-rank",
        25,
        "scmoe/models/gpt.py",
        "torch.Generator().manual_seed(seed)",
        "torch.Generator().manual_seed(seed + torch.distributed.get_rank())",
        (EP,),
    ),
    Mutant(
        "ranks-drop-the-same-features",
        25,
        f"{PARALLEL}/strategy.py",
        " % 2**62 + self.global_rank)",
        " % 2**62)",
        (f"{DIST}/test_ep_equality.py::test_ranks_drop_other_features",),
    ),
    # ------------------------------------------------------------------ routing
    Mutant(
        "logits-in-bf16",
        28,
        f"{MOE}/router.py",
        "x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))",
        "x_TD.to(torch.bfloat16)",
        (f"{UNIT}/test_router.py::test_bf16_never_reaches_the_logits",),
    ),
    Mutant(
        "router-under-autocast",
        28,
        f"{MOE}/router.py",
        "with torch.autocast(x_TD.device.type, enabled=False):",
        "with torch.enable_grad():",
        (f"{UNIT}/test_router.py::test_bf16_never_reaches_the_logits",),
    ),
    Mutant(
        "weights-not-renormalised",
        0,
        f"{MOE}/router.py",
        "            if self.top_k > 1:\n",
        "            if self.top_k > self.num_experts:\n",
        (f"{UNIT}/test_router.py::test_equals_the_oracle",),
    ),
    Mutant(
        "top-1-renormalised",
        23,
        f"{MOE}/router.py",
        "            if self.top_k > 1:\n",
        "            if self.top_k > 0:\n",
        (f"{UNIT}/test_router.py::test_weights_and_their_gradient_for_the_gate",),
    ),
    Mutant(
        "last-come-first-served",
        29,
        f"{MOE}/layout.py",
        "order_N = ids_N.argsort(stable=True)",
        "order_N = ids_N.numel() - 1 - ids_N.flip(0).argsort(stable=True)",
        (f"{UNIT}/test_layout.py::test_exactly_the_oracles_copies_are_kept",),
    ),
    Mutant(
        "padding-counted-as-dropped",
        29,
        f"{MOE}/balance.py",
        "layout.num_dropped - (T - num_tokens) * K",
        "layout.num_dropped",
        (f"{UNIT}/test_balance.py::test_padding_is_left_out_of_every_sum",),
    ),
    Mutant(
        "padding-takes-slots",
        30,
        f"{MOE}/router.py",
        "topk_ids_TK = topk_ids_TK.where(mask_T[:, None], self.num_experts)",
        "topk_ids_TK = topk_ids_TK.clone()",
        (f"{UNIT}/test_stream.py::test_padding_does_not_change_which_copies_are_dropped",),
    ),
    Mutant(
        "padding-brings-slots",
        30,
        f"{MOE}/stream.py",
        "limit = None if mask_T is None else",
        "limit = None if factor else",
        (f"{UNIT}/test_stream.py::test_padding_does_not_change_which_copies_are_dropped",),
    ),
    Mutant(
        "no-rows-no-gradient",
        20,
        f"{MOE}/layout.py",
        "    if num_rows == 0:\n",
        "    if num_rows < 0:\n",
        (f"{UNIT}/test_stream.py::test_a_batch_of_padding_alone_gives_zeros",),
    ),
    # ------------------------------------------------------------------ schedule
    Mutant(
        "slot-ignored",
        0,
        "scmoe/blocks/shortcut.py",
        "if slot == self.schedule.slot else state",
        "if slot == 0 else state",
        (f"{UNIT}/test_schedule.py::test_blocks_execute_the_operators_of_their_schedule",),
    ),
    Mutant(
        "chunks-put-together-backwards",
        0,
        f"{MOE}/stream.py",
        "torch.cat(chunks) if",
        "torch.cat(chunks[::-1]) if",
        (f"{ORACLE}::test_chunks_equal_oracle",),
    ),
    # ------------------------------------------------------------------ stopping, configuration
    Mutant(
        "asked-to-stop-alone",
        12,
        f"{PARALLEL}/poll.py",
        "(dist.all_reduce(sums, group=self.group, async_op=True), sums)",
        "(dist.all_reduce(sums.clone(), group=self.group, async_op=True), sums)",
        (f"{DIST}/test_poll.py",),
    ),
    Mutant(
        "run-name-leaves-its-root",
        36,
        "scmoe/config_check.py",
        "NAME.fullmatch(config.name)",
        "NAME.search(config.name)",
        (f"{UNIT}/test_config.py::test_impossible_combination_names_its_key",),
    ),
    Mutant(
        "interpolation-allowed",
        35,
        "scmoe/config.py",
        'if any("${" in text or text == "???" for text in texts):',
        'if any(text == "???" for text in texts):',
        (f"{UNIT}/test_config.py::test_bad_override",),
    ),
    Mutant(
        "tags-allowed",
        35,
        "scmoe/config_yaml.py",
        "(yaml.TagToken, yaml.AnchorToken, yaml.AliasToken)",
        "(yaml.AnchorToken, yaml.AliasToken)",
        (f"{UNIT}/test_config.py::test_bad_file_is_named",),
    ),
    Mutant(
        "experts-not-divisible",
        37,
        "scmoe/config_check.py",
        "config.moe.num_experts % ep_size:",
        "config.moe.num_experts < ep_size:",
        (f"{UNIT}/test_config.py::test_impossible_combination_names_its_key",),
    ),
    Mutant(
        "norms-decay",
        0,
        "scmoe/training/module.py",
        '"weight_decay": 0.0}',
        '"weight_decay": self.weight_decay}',
        (f"{UNIT}/test_module.py::test_matrices_decay_and_nothing_else",),
    ),
)
