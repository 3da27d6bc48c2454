"""These bugs make results of several ranks differ from those of one process: transfers, gradients,
split weights."""

from __future__ import annotations

from tests.mutation.mutant import DIST, FAULTS, LIGHTNING, PARALLEL, UPDATE, WIRE, Mutant

EP = (  # all gradients
    f"{DIST}/test_negative_controls.py::test_with_nothing_broken_two_ranks_equal_one"
)
DP = (
    f"{DIST}/test_strategy.py::"
    "test_a_run_resumed_in_another_layout_equals_an_uninterrupted_one[2-1]"
)
FOUR = f"{DIST}/test_sharded.py::test_four_ranks_equal_one"
NOT_FINITE = (
    f"{FAULTS}/test_not_finite.py"
    "::test_a_number_that_is_not_finite_stops_all_ranks_before_the_update"
)
RUNS = f"{DIST}/test_sharded_runs.py"

MUTANTS = (
    # ------------------------------------------------------------------ transfers
    Mutant("buffer-not-held", f"{WIRE}/all_to_all.py")
    .replaces(
        "self.exchange(self.source, traffic)\n",
        "self.exchange(self.source, traffic)\n        self.source = None\n",
    )
    .caught_by(f"{FAULTS}/test_experts.py::test_buffers_are_held_until_the_wait_and_no_longer"),
    Mutant("no-wait-forward", f"{WIRE}/all_to_all.py")
    .replaces(
        "        transfer.finish()\n        return rows.view_as(rows)\n",
        "        return rows.view_as(rows)\n",
    )
    .caught_by(f"{DIST}/test_negative_controls.py::test_late_transfers_change_no_bit"),
    Mutant("no-wait-backward", f"{WIRE}/all_to_all.py")
    .replaces(
        "        transfer.finish()\n        grad, transfer.grad", "        grad, transfer.grad"
    )
    .caught_by(f"{DIST}/test_negative_controls.py::test_late_transfers_change_no_bit"),
    Mutant("backward-waits-at-once", f"{WIRE}/all_to_all.py")
    .replaces(
        "        transfer.grad = transfer.launch(grad, backward=True)\n",
        "        transfer.grad = transfer.launch(grad, backward=True)\n       "
        " transfer.work.wait()\n",
    )
    .caught_by(
        f"{DIST}/test_all_to_all.py::test_a_transfer_hides_behind_the_work_forward_and_backward"
    ),
    Mutant("error-of-a-transfer-raised-once", f"{WIRE}/all_to_all.py")
    .replaces(
        "                works[0].wait()  #",
        "                works.pop(0).wait()\n                continue  #",
    )
    .caught_by(f"{DIST}/test_all_to_all.py::test_an_error_of_rows_reaches_both_that_wait_for_them"),
    Mutant("rows-left-grouped-by-sender", f"{WIRE}/all_to_all.py")
    .replaces(
        "order_R = experts_of_rows(counts, rows_RD.shape[0]).argsort(stable=True)",
        "order_R = torch.arange(sum(counts.traffic.received), device=rows_RD.device)",
    )
    .caught_by(EP),
    Mutant("empty-buffer-rows-computed", f"{WIRE}/announced.py")
    .replaces("right=True", "right=False")
    .caught_by(f"{FAULTS}/test_capacity.py::test_enough_slots_are_bit_identical_to_dropless"),
    Mutant("ceiling-of-the-total", f"{WIRE}/announced.py")
    .replaces("fair = sum(received) / len(received)", "fair = sum(received)")
    .caught_by(f"{FAULTS}/test_ceiling.py::test_the_ceiling_is_a_multiple_of_the_fair_share"),
    Mutant("a-ceiling-for-each-chunk", f"{WIRE}/announced.py")
    .replaces(
        "check_ceiling(rows.sum((0, 1)).tolist(), self.ceiling)",
        "[check_ceiling(chunk, self.ceiling) for chunk in rows.sum(0).tolist()]",
    )
    .caught_by(f"{FAULTS}/test_ceiling.py::test_chunks_do_not_change_what_a_ceiling_allows"),
    # ------------------------------------------------------------------ gradients and updates
    Mutant("no-1/EP", f"{UPDATE}/wrap.py")
    .replaces("return grad / self.context.ep_size", "return grad")
    .caught_by(EP),
    Mutant("no-mean-over-EDP", f"{UPDATE}/wrap.py")
    .replaces("            flat /= self.context.edp_size\n", "")
    .caught_by(DP),
    Mutant("no_sync-ignored", f"{UPDATE}/wrap.py")
    .replaces("self.reducer.enabled = False", "self.reducer.enabled = True")
    .caught_by(f"{DIST}/test_strategy.py::test_expert_gradients_are_sent_once_a_step"),
    Mutant("frozen-experts-waited-for", f"{UPDATE}/wrap.py")
    .replaces("[p for p in self.shards if p.requires_grad]", "self.shards")
    .caught_by(
        f"{DIST}/test_strategy.py::test_experts_that_are_unfrozen_during_training_have_the_gradients_of_others"
    ),
    Mutant("experts-given-to-DDP", f"{PARALLEL}/torch_seam.py")
    .replaces(
        'getattr(module, "_ddp_params_and_buffers_to_ignore", []), *names}',
        'getattr(module, "_ddp_params_and_buffers_to_ignore", [])}',
    )
    .caught_by(EP),
    Mutant("norm-of-own-shards", f"{UPDATE}/guard.py")
    .replaces("parts[context.edp_size].append", "parts[context.world_size].append")
    .caught_by(EP),
    Mutant("norm-of-experts-not-averaged", f"{UPDATE}/guard.py")
    .replaces(
        "total_norm(gradients, device).square() / holders", "total_norm(gradients, device).square()"
    )
    .caught_by(f"{DIST}/test_gradient_norms.py"),
    Mutant("update-despite-non-finite-norm", f"{UPDATE}/guard.py")
    .replaces("        if torch.isfinite(norm):\n", "        if norm.numel() == 1:\n")
    .caught_by(f"{FAULTS}/test_not_finite.py::test_one_process_stops_too"),
    Mutant("unclipped-modules-not-watched", f"{LIGHTNING}/guarded_update.py")
    .replaces(
        "        norm = self.clip_by_norm(optimizer, None)",
        "        norm = self.clip_by_norm(optimizer, None) if clip_val > 0 else None",
    )
    .caught_by(f"{NOT_FINITE}[output-not at all]"),
    Mutant("steps-by-hand-not-watched", f"{LIGHTNING}/guarded_update.py")
    .replaces(
        "            self.clip_by_norm(optimizer, None)\n        elif",
        "            assert optimizer is not None\n        elif",
    )
    .caught_by(f"{NOT_FINITE}[output-by hand]"),
    Mutant("clipping-past-strategy-accepted", f"{LIGHTNING}/guarded_update.py")
    .replaces("        elif not self.is_checked:\n", "        elif self.guard is None:\n")
    .caught_by(
        f"{FAULTS}/test_not_finite.py::test_a_module_that_clips_by_other_means_is_refused[2]"
    ),
    Mutant("pure-float16-accepted", f"{LIGHTNING}/guarded_update.py")
    .replaces('plugin.precision in ("16-true", "16-mixed")', 'plugin.precision == "16-mixed"')
    .caught_by(f"{FAULTS}/test_lightning_users.py::test_float16_is_refused"),
    Mutant("ranks-drop-the-same-features", f"{LIGHTNING}/strategy.py")
    .replaces('device="cpu")) + self.global_rank', 'device="cpu"))')
    .caught_by(f"{DIST}/test_ep_equality.py::test_each_rank_drops_different_features"),
    Mutant("steps-draw-from-the-samplers-generator", f"{LIGHTNING}/strategy.py")
    .replaces("        with torch.random.fork_rng(devices=()):\n", "        with ExitStack():\n")
    .caught_by(
        f"{DIST}/test_strategy.py::test_samplers_without_a_generator_give_every_sample_to_one_rank"
    ),
    # ------------------------------------------------------------------ split dense weights
    Mutant("split-loss-not-divided", f"{UPDATE}/wrap.py")
    .replaces("else loss / self.world_size", "else loss")
    .caught_by(f"{FOUR}[clipped, EP 2]"),
    Mutant("split-divided-by-fsdp-too", f"{PARALLEL}/dense.py")
    .replaces("part.set_gradient_divide_factor(1.0)", "part.set_gradient_divide_factor(2.0)")
    .caught_by(f"{FOUR}[clipped, EP 2]"),
    Mutant("split-experts-over-the-wrong-group", f"{PARALLEL}/dense.py")
    .replaces('split_over(context.mesh["edp"], 1)', 'split_over(context.mesh["ep"], 1)')
    .caught_by(f"{FOUR}[clipped, EP 2]"),
    Mutant("split-copies-counted-twice", f"{PARALLEL}/dense.py")
    .replaces("if placement.is_replicate()), 1)", "if placement.is_replicate() and size == 0), 1)")
    .caught_by(f"{FOUR}[norm, recompute, hybrid, EP 1]"),
    Mutant("split-gate-rounded", f"{PARALLEL}/dense.py")
    .replaces("            gather_as_kept(part, in_float32)\n", "")
    .caught_by(
        f"{RUNS}::test_under_bf16_mixed_matrices_are_gathered_in_bfloat16_and_gates_in_float32"
    ),
    Mutant("split-experts-gathered-in-the-stream", f"{PARALLEL}/dense.py")
    .replaces(
        "    blocks = units(module)\n",
        "    apart = [[m] for m in module.modules() if type(m).__name__ == 'Experts']\n"
        "    blocks = apart + units(module)\n",
    )
    .caught_by(f"{RUNS}::test_fsdp_starts_no_collective_inside_an_open_stream"),
    Mutant("whole-weights-after-validation", f"{LIGHTNING}/job.py")
    .replaces("        reshard(self.trainer.lightning_module)\n", "        assert self.trainer\n")
    .caught_by(f"{RUNS}::test_a_users_own_module_is_split_and_equal_to_replicated"),
)
