"""These bugs make results of several ranks differ from those of one process: transfers, gradients, seeds."""

from __future__ import annotations

from tests.mutation.mutant import DIST, DP, EP, FAULTS, MOE, ORACLE, PARALLEL, UNIT, Mutant

TWO_HOPS = f"{DIST}/test_hierarchical.py::test_two_hops_change_no_bit"

MUTANTS = (
    # ------------------------------------------------------------------ transfers
    Mutant("buffer-not-held", 17, "scmoe/parallel/wire/all_to_all.py")
    .replaces(
        "self.exchange(self.source, traffic)\n", "self.exchange(self.source, traffic)\n        self.source = None\n"
    )
    .caught_by(f"{FAULTS}/test_experts.py::test_17_buffers_are_held_until_the_wait_and_no_longer"),
    Mutant("no-wait-forward", 18, "scmoe/parallel/wire/all_to_all.py")
    .replaces("        transfer.finish()\n        return rows.view_as(rows)\n", "        return rows.view_as(rows)\n")
    .caught_by(f"{DIST}/test_negative_controls.py::test_late_transfers_change_no_bit"),
    Mutant("no-wait-backward", 18, "scmoe/parallel/wire/all_to_all.py")
    .replaces("        transfer.finish()\n        grad, transfer.grad", "        grad, transfer.grad")
    .caught_by(f"{DIST}/test_negative_controls.py::test_late_transfers_change_no_bit"),
    Mutant("backward-waits-at-once", 0, "scmoe/parallel/wire/all_to_all.py")
    .replaces(
        "        transfer.grad = transfer.launch(grad, backward=True)\n",
        "        transfer.grad = transfer.launch(grad, backward=True)\n        transfer.work.wait()\n",
    )
    .caught_by(f"{DIST}/test_all_to_all.py::test_a_transfer_hides_behind_the_work_forward_and_backward"),
    Mutant("rows-left-grouped-by-sender", 0, "scmoe/parallel/wire/all_to_all_dispatcher.py")
    .replaces(
        "order_R = self.experts_of_rows(counts, rows_RD.shape[0]).argsort(stable=True)",
        "order_R = torch.arange(sum(counts.traffic.received), device=rows_RD.device)",
    )
    .caught_by(EP),
    Mutant("ceiling-of-the-total", 31, "scmoe/parallel/wire/all_to_all_dispatcher.py")
    .replaces("fair = sum(received) / len(received)", "fair = sum(received)")
    .caught_by("tests/faults/test_ceiling.py::test_31_the_ceiling_is_a_multiple_of_the_fair_share"),
    # ------------------------------------------------------------------ two hops
    Mutant("second-hop-rows-of-another-place", 0, "scmoe/parallel/wire/hierarchical.py")
    .replaces("by_place[:, place, node]", "by_place[node, :, :, place].T")
    .caught_by(f"{UNIT}/test_hierarchical.py::test_two_hops_equal_one"),
    Mutant("blocks-stay-in-their-order", 0, "scmoe/parallel/wire/hierarchical.py")
    .replaces("for b in range(width) for piece in pieces[b::width]", "for piece in pieces")
    .caught_by(f"{UNIT}/test_hierarchical.py::test_two_hops_equal_one"),
    Mutant("second-hop-not-regrouped", 0, "scmoe/parallel/wire/hierarchical.py")
    .replaces("regrouped = swap_blocks(met, hops.between)\n        return", "regrouped = met\n        return")
    .caught_by(TWO_HOPS),
    Mutant("arrived-rows-left-by-place", 0, "scmoe/parallel/wire/hierarchical.py")
    .replaces("swap_blocks(self.arrived, self.blocks, self.target)", "self.target.copy_(self.arrived)")
    .caught_by(TWO_HOPS),
    Mutant("second-hop-waits-for-nothing", 18, "scmoe/parallel/wire/hierarchical.py")
    .replaces("        first.wait()\n", "")
    .caught_by(TWO_HOPS),
    Mutant("way-back-of-the-way-there", 0, f"{MOE}/dispatcher.py")
    .replaces("self.sent, self.by_rank.T)", "self.sent, self.by_rank)")
    .caught_by(TWO_HOPS),
    Mutant("each-rank-chooses-for-itself", 0, "scmoe/parallel/wire/hierarchical.py")
    .replaces("        dist.all_reduce(slowest, dist.ReduceOp.MAX, self.group)\n", "")
    .caught_by(TWO_HOPS),
    Mutant("parts-of-nodes-accepted", 76, f"{PARALLEL}/mesh.py")
    .replaces("ep_size > ranks_per_node > 1 and ep_size % ranks_per_node == 0", "ep_size > ranks_per_node > 1")
    .caught_by(f"{UNIT}/test_groups.py::test_two_hops_require_groups_of_several_whole_nodes"),
    # ------------------------------------------------------------------ gradients over ranks
    Mutant("no-1/EP", 21, f"{PARALLEL}/update/reducer.py")
    .replaces("return grad / self.context.ep_size", "return grad")
    .caught_by(EP),
    Mutant("no-mean-over-EDP", 21, f"{PARALLEL}/update/reducer.py")
    .replaces("            flat /= self.context.edp_size\n", "")
    .caught_by(DP),
    Mutant("no_sync-ignored", 0, "scmoe/parallel/update/wrap.py")
    .replaces("self.reducer.enabled = False", "self.reducer.enabled = True")
    .caught_by(f"{DIST}/test_strategy.py::test_expert_gradients_are_sent_once_a_step[2]"),
    Mutant("gradients-beside-rows", 0, f"{PARALLEL}/update/pacing.py")
    .replaces("                    self.link.wait()\n", "")
    .caught_by(f"{UNIT}/test_pacing.py::test_rows_wait_behind_the_pieces_in_flight_alone"),
    Mutant("gradients-in-one-piece", 0, f"{PARALLEL}/update/pacing.py")
    .replaces("flat.split(max(1, self.piece_bytes // flat.element_size()))", "[flat]")
    .caught_by(f"{UNIT}/test_pacing.py::test_rows_wait_behind_the_pieces_in_flight_alone"),
    Mutant("paced-sum-for-mean", 21, f"{PARALLEL}/update/pacing.py")
    .replaces(".mul_(1 / dist.get_world_size(self.group))", "")
    .caught_by(f"{DIST}/test_strategy.py::test_when_gradients_are_sent_changes_no_bit[2]"),
    Mutant("error-of-a-transfer-raised-once", 0, "scmoe/parallel/wire/all_to_all.py")
    .replaces("                works[0].wait()  #", "                works.pop(0).wait()\n                continue  #")
    .caught_by(f"{UNIT}/test_pacing.py::test_an_error_of_rows_reaches_both_that_wait_for_them"),
    Mutant("gradients-sent-before-they-exist", 0, "scmoe/schedule/limit.py")
    .replaces("end = max(end, ready + after)", "end = max(end, after)")
    .caught_by(f"{UNIT}/test_limit.py"),
    Mutant("experts-given-to-DDP", 25, "scmoe/parallel/torch_seam.py")
    .replaces(
        'getattr(module, "_ddp_params_and_buffers_to_ignore", []), *names}',
        'getattr(module, "_ddp_params_and_buffers_to_ignore", [])}',
    )
    .caught_by(EP),
    Mutant("early-experts-accepted", 41, f"{PARALLEL}/mesh.py")
    .replaces("isinstance(child, Experts) and child.expert_ids", "child is None and child.expert_ids")
    .caught_by(f"{FAULTS}/test_early_experts.py::test_41_experts_that_the_strategy_cannot_shard_are_refused"),
    Mutant("norm-of-own-shards", 22, f"{PARALLEL}/update/guard.py")
    .replaces("parts[context.edp_size].append", "parts[context.world_size].append")
    .caught_by(EP),
    Mutant("router-gradient-lost", 23, f"{MOE}/stream.py")
    .replaces(
        "rows_RD, state.routing.topk_weights_TK, state.layout)",
        "rows_RD, state.routing.topk_weights_TK.detach(), state.layout)",
    )
    .caught_by(f"{ORACLE}::test_architecture_equals_oracle"),
    Mutant("balance-loss-depends-on-ranks", 24, f"{MOE}/balance.py")
    .replaces("score_sums_LE * world_size / tokens_L", "score_sums_LE / tokens_L")
    .caught_by(f"{UNIT}/test_balance.py::test_mean_over_ranks_is_the_loss_of_the_global_batch"),
    Mutant("balance-loss-of-own-tokens", 24, "scmoe/training/modules.py")
    .replaces("load_balance_loss(stats, load_sums_LE2, world_size)", "load_balance_loss(stats, integer_sums(stats), 1)")
    .caught_by(EP),
    Mutant("update-despite-non-finite-norm", 27, f"{PARALLEL}/update/guard.py")
    .replaces("        if torch.isfinite(norm):\n", "        if norm.numel() == 1:\n")
    .caught_by("tests/faults/test_not_finite.py::test_27_one_process_stops_too"),
    Mutant("unclipped-modules-not-watched", 27, "scmoe/lightning/guarded_update.py")
    .replaces(
        "        else:\n            self.clip_by_norm(optimizer, None)",
        "        else:\n            self.clip_by_norm(optimizer, None) if clip_val > 0 else None",
    )
    .caught_by(f"{FAULTS}/test_not_finite.py::test_27_a_module_that_does_not_clip_by_norm_is_watched_too[not at all]"),
    Mutant("steps-by-hand-not-watched", 27, "scmoe/lightning/guarded_update.py")
    .replaces(
        "            self.clip_by_norm(optimizer, None)\n        elif",
        "            assert optimizer is not None\n        elif",
    )
    .caught_by(f"{FAULTS}/test_not_finite.py::test_27_a_module_that_steps_by_hand_is_watched_too[output]"),
    Mutant("clipping-past-strategy-accepted", 27, "scmoe/lightning/guarded_update.py")
    .replaces("        elif self.norm is None:\n", "        elif self.guard is None:\n")
    .caught_by(f"{FAULTS}/test_not_finite.py::test_27_a_module_that_clips_by_other_means_is_refused[2]"),
    # ------------------------------------------------------------------ seeding
    Mutant("experts-drawn-by-local-id", 25, f"{MOE}/experts.py")
    .replaces("in zip(self.expert_ids, weight, strict=True):", "in enumerate(weight):")
    .caught_by(f"{UNIT}/test_experts.py::test_weights_do_not_depend_on_the_ep_degree"),
    Mutant("experts-drawn-equal", 25, f"{MOE}/experts.py")
    .replaces('f"{key}/{name}/{expert}"', 'f"{key}/{name}"')
    .caught_by(f"{UNIT}/test_experts.py::test_every_expert_tensor_and_key_differs"),
    Mutant("dense-weights-drawn-by-rank", 25, "scmoe/models/decoder.py")
    .replaces('named_generator(f"{seed}/{name}")', 'named_generator(f"{seed + torch.distributed.get_rank()}/{name}")')
    .caught_by(EP),
    Mutant("ranks-drop-the-same-features", 25, "scmoe/lightning/strategy.py")
    .replaces('device="cpu")) + self.global_rank', 'device="cpu"))')
    .caught_by(f"{DIST}/test_ep_equality.py::test_each_rank_drops_different_features"),
    Mutant("cheap-rank-prices-transfers", 0, "scmoe/planning/pricing.py")
    .replaces("times_GRdN2.amax(1).unbind(-1)", "times_GRdN2.mean(1).unbind(-1)")
    .caught_by("tests/unit/test_pricing.py::test_prices_are_those_of_the_slowest_rank"),
    Mutant("experts-priced-from-the-last-begin", 0, "scmoe/planning/pricing.py")
    .replaces("took_dN[:, experts] = longest_dN", "pass")
    .caught_by("tests/unit/test_pricing.py::test_prices_are_those_of_the_slowest_rank"),
    Mutant("all-groups-one-price", 0, "scmoe/planning/pricing.py")
    .replaces("(-1, ep_size or len(times_R))", "(-1, len(times_R))")
    .caught_by("tests/unit/test_pricing.py::test_each_ep_group_has_prices_of_its_own_and_their_mean_counts"),
    Mutant("clocks-of-ranks-compared", 0, "scmoe/moe/operators.py")
    .replaces("return lambda seconds: seconds - zero", "return float")
    .caught_by("tests/unit/test_pricing.py::test_prices_are_those_of_the_slowest_rank"),
    Mutant("negative-shares-logged", 0, "scmoe/planning/planner.py")
    .replaces("if -NOISE <= part <= 1 + NOISE else None", "if part <= 1 + NOISE else None")
    .caught_by("tests/unit/test_pricing.py::test_a_disturbed_step_has_no_hidden_part"),
    Mutant("clocks-not-started", 0, "scmoe/planning/planner.py")
    .replaces("            start_clocks(self.recorders, self.group)\n", "")
    .caught_by("tests/distributed/test_planner.py::test_the_choice_is_equal_on_all_ranks_and_changes_no_bit"),
    Mutant("ran-said-again", 0, "scmoe/training/callbacks/adaptive_schedule.py")
    .replaces(
        "self.show_what_ran |= [c.schedule for c in choices] != [c.schedule for c in self.shown]",
        "self.show_what_ran = True",
    )
    .caught_by(
        "tests/unit/test_planner_lines.py::test_what_ran_is_said_once_for_a_schedule_and_only_measured_shares_are_logged"
    ),
    Mutant("steps-draw-from-the-samplers-generator", 0, "scmoe/lightning/strategy.py")
    .replaces("        with torch.random.fork_rng(devices=()):\n", "        with ExitStack():\n")
    .caught_by("tests/distributed/test_strategy.py::test_samplers_without_a_generator_give_every_sample_to_one_rank"),
    Mutant("frozen-experts-waited-for", 0, "scmoe/parallel/update/reducer.py")
    .replaces("[p for p in self.shards if p.requires_grad]", "self.shards")
    .caught_by(
        "tests/distributed/test_strategy.py::test_experts_that_are_unfrozen_during_training_have_the_gradients_of_others"
    ),
    Mutant("stream-in-bfloat16", 0, "scmoe/models/decoder.py")
    .replaces("residual_stream(self.tokens(ids_BS))", "self.tokens(ids_BS)")
    .caught_by(
        "tests/unit/test_models.py::test_weights_that_are_gathered_in_bfloat16_leave_the_residual_stream_in_float32"
    ),
    Mutant("slots-sent-unannounced", 0, "scmoe/moe/stream.py")
    .replaces("self.filled or (not self.training and self.num_ranks > 1)", "self.filled")
    .caught_by("tests/faults/test_capacity.py::test_ranks_may_have_different_numbers_of_tokens_outside_training"),
    Mutant("losses-of-rank-0-logged", 0, "scmoe/training/modules.py")
    .replaces(
        "self.parallel_context.sum_over_ranks(torch.stack([*shown.values()])) / world_size",
        "torch.stack([*shown.values()])",
    )
    .caught_by("tests/distributed/test_ep_equality.py::test_every_rank_logs_the_losses_of_all_ranks"),
    Mutant("frozen-start-not-priced", 0, "scmoe/planning/pricing.py")
    .replaces("of_gate or spans", "of_gate")
    .caught_by("tests/unit/test_operators.py::test_a_block_is_priced_where_all_before_it_is_frozen"),
    Mutant("guard-keeps-every-batch", 0, "scmoe/parallel/update/guard.py")
    .replaces("self.trace[name] * 0 + total", "total")
    .caught_by("tests/faults/test_not_finite.py::test_27_batches_without_a_check_keep_no_more_than_one_batch"),
)
