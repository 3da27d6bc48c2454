"""These bugs route tokens wrongly, or run or plan the MoE layer wrongly."""

from __future__ import annotations

from tests.mutation.mutant import DIST, FAULTS, MOE, ORACLE, UNIT, Mutant

MUTANTS = (
    # ------------------------------------------------------------------ routing
    Mutant("logits-in-bf16", 28, f"{MOE}/router.py")
    .replaces("x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))", "x_TD.to(torch.bfloat16)")
    .caught_by(f"{UNIT}/test_router.py::test_bf16_never_reaches_the_logits"),
    Mutant("router-under-autocast", 28, f"{MOE}/router.py")
    .replaces("with torch.autocast(x_TD.device.type, enabled=False):", "with torch.enable_grad():")
    .caught_by(f"{UNIT}/test_router.py::test_bf16_never_reaches_the_logits"),
    Mutant("weights-not-renormalised", 0, f"{MOE}/router.py")
    .replaces("self.renormalise = renormalise and top_k > 1", "self.renormalise = False")
    .caught_by(f"{UNIT}/test_router.py::test_equals_the_oracle"),
    Mutant("top-1-renormalised", 23, f"{MOE}/router.py")
    .replaces("self.renormalise = renormalise and top_k > 1", "self.renormalise = renormalise")
    .caught_by(f"{UNIT}/test_router.py::test_weights_and_their_gradient_for_the_gate"),
    Mutant("last-copies-kept-first", 29, f"{MOE}/layout.py")
    .replaces(
        "second choice\n    order_N = ids_N.argsort(stable=True)",
        "second choice\n    order_N = ids_N.numel() - 1 - ids_N.flip(0).argsort(stable=True)",
    )
    .caught_by(f"{UNIT}/test_layout.py::test_exactly_the_oracles_copies_are_kept"),
    Mutant("empty-slots-have-gradients", 29, f"{MOE}/layout.py")
    .replaces(
        "weights_R = _pick(weights_TK.reshape(-1, 1), copies_R, ctx.complete)",
        "weights_R = weights_TK.reshape(-1, 1)[copies_R.clamp(max=weights_TK.numel() - 1)]",
    )
    .caught_by(f"{FAULTS}/test_capacity.py::test_29_enough_slots_are_bit_identical_to_dropless"),
    Mutant("buffer-one-row-too-long", 31, "scmoe/moe/layout.py")
    .replaces("(places(rank_TK, num_ranks) < size)", "(places(rank_TK, num_ranks) <= size)")
    .caught_by(f"{UNIT}/test_layout.py::test_a_buffer_holds_the_first_copies_of_its_rank_in_the_order_of_its_experts"),
    Mutant("empty-buffer-rows-computed", 31, "scmoe/parallel/wire/all_to_all_dispatcher.py")
    .replaces("contiguous(), right=True)", "contiguous(), right=False)")
    .caught_by(f"{FAULTS}/test_capacity.py::test_29_enough_slots_are_bit_identical_to_dropless"),
    Mutant("overflow-never-refused", 31, "scmoe/training/modules.py")
    .replaces("        if dropped:\n", "        if dropped < 0:\n")
    .caught_by(f"{FAULTS}/test_ceiling.py::test_31_rows_beyond_a_buffer_are_dropped_or_refused_on_all_ranks"),
    Mutant("filled-rows-keep-what-is-dropped", 29, f"{MOE}/layout.py")
    .replaces("places(topk_ids_TK, num_experts) < room, num_experts", "topk_ids_TK >= 0, num_experts")
    .caught_by(f"{UNIT}/test_layout.py::test_exactly_the_oracles_copies_are_kept"),
    Mutant("padding-counted-as-dropped", 29, f"{MOE}/balance.py")
    .replaces("layout.num_dropped - (T - num_tokens) * K", "layout.num_dropped")
    .caught_by(f"{UNIT}/test_balance.py::test_padding_is_left_out_of_every_sum"),
    Mutant("padding-takes-slots", 30, f"{MOE}/router.py")
    .replaces("topk_ids_TK = topk_ids_TK.where(mask_T[:, None], self.num_experts)", "topk_ids_TK = topk_ids_TK.clone()")
    .caught_by(f"{UNIT}/test_stream.py::test_padding_does_not_change_which_copies_are_dropped"),
    Mutant("padding-adds-slots", 30, f"{MOE}/stream.py")
    .replaces("room = capacity if mask_T is None else", "room = capacity if factor else")
    .caught_by(f"{UNIT}/test_stream.py::test_padding_does_not_change_which_copies_are_dropped"),
    Mutant("no-rows-no-gradient", 20, f"{MOE}/layout.py")
    .replaces("    if num_rows == 0:\n", "    if num_rows < 0:\n")
    .caught_by(f"{UNIT}/test_stream.py::test_a_batch_of_padding_alone_gives_zeros"),
    Mutant("collapse-never-reported", 26, "scmoe/training/callbacks/expert_load.py")
    .replaces("self.windows.get(layer, 0) + 1 if collapsed else 0", "1 if collapsed else 0")
    .caught_by(f"{UNIT}/test_expert_load.py::test_a_collapsed_layer_is_named_once_with_its_expert_and_share"),
    # ------------------------------------------------------------------ schedule
    Mutant("slot-ignored", 0, "scmoe/blocks/shortcut.py")
    .replaces("            if slot == self.schedule.slot:\n", "            if slot == 0:\n")
    .caught_by(f"{UNIT}/test_schedule.py::test_blocks_execute_the_operators_of_their_schedule"),
    Mutant("chunks-joined-in-reverse", 0, f"{MOE}/stream.py")
    .replaces("torch.cat(chunks) if", "torch.cat(chunks[::-1]) if")
    .caught_by(f"{ORACLE}::test_chunks_equal_oracle"),
    # ------------------------------------------------------------------ planner
    Mutant("planner-measures-other-chunks", 0, "scmoe/planning/planner.py")
    .replaces("if fixed else set(chunk_counts))", "if fixed else {1, *chunk_counts})")
    .caught_by(f"{DIST}/test_planner.py::test_a_fixed_number_of_chunks_is_kept_in_every_step_and_no_bit_changes[2]"),
    Mutant("planner-takes-the-slower", 0, "scmoe/planning/planner.py")
    .replaces("return [min(zip(seconds", "return [max(zip(seconds")
    .caught_by(f"{DIST}/test_planner.py::test_two_chunk_counts_are_measured_then_tried_and_the_faster_is_chosen"),
    Mutant("planner-ignores-drift", 0, "scmoe/planning/planner.py")
    .replaces("self.drifted == DRIFTED_IN_TURN", "self.drifted < 0")
    .caught_by(f"{DIST}/test_planner.py::test_after_drift_all_ranks_make_the_same_new_choice"),
    Mutant("noise-logged-as-hidden", 0, "scmoe/planning/planner.py")
    .replaces("if share >= LEAST_SHARE else None", "if share else None")
    .caught_by(f"{UNIT}/test_planner_lines.py::test_a_hidden_share_is_none_where_communication_is_below_the_noise"),
    Mutant("planner-leaves-transfers-blocking", 0, "scmoe/planning/planner.py")
    .replaces("if self.choices else self.own)", "if self.choices else self.own, blocking=True)")
    .caught_by(f"{DIST}/test_planner.py::test_a_closed_planner_leaves_nothing_on_the_blocks[4]"),
    # ------------------------------------------------------------------ rows of the experts
    Mutant("router-statistics-sync-with-host", 0, f"{MOE}/balance.py")
    .replaces("counts_E = count(ids_N, E)", "counts_E = torch.bincount(ids_N, minlength=E + 1)[:E]")
    .caught_by(f"{UNIT}/test_no_host_sync.py::test_forward_and_backward_ask_the_host_for_nothing"),
    Mutant("equal-counts-sync-with-host", 0, f"{MOE}/experts.py")
    .replaces("        return batched_mlps\n", "        return grouped_mlps\n")
    .caught_by(f"{UNIT}/test_no_host_sync.py::test_forward_and_backward_ask_the_host_for_nothing"),
    Mutant("combine-ignores-wire-dtype", 0, f"{MOE}/dispatcher.py")
    .replaces(
        "Arriving(self.inner.combine(rows_RD.to(self.dtype), receipt), partial(Tensor.to, dtype=rows_RD.dtype))",
        "self.inner.combine(rows_RD, receipt)",
    )
    .caught_by(f"{UNIT}/test_dispatcher.py::test_narrowed_rows_travel_in_their_type_and_are_rounded_once_each_way"),
)
