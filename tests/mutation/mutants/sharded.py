"""These bugs make a run with split dense weights differ from one process, or slower than its schedule says."""

from __future__ import annotations

from tests.mutation.mutant import DIST, FAULTS, PARALLEL, UNIT, Mutant

FOUR = f"{DIST}/test_sharded.py::test_four_ranks_equal_one"
RUNS = f"{DIST}/test_sharded_runs.py"
BUILT = f"{DIST}/test_built_in_parts.py::test_no_rank_holds_more_than_its_part_and_a_block"
SHARDS = f"{PARALLEL}/dense.py"

MUTANTS = (
    Mutant("split-loss-not-divided", 21, "scmoe/parallel/update/wrap.py")
    .replaces("else loss / self.world_size", "else loss")
    .caught_by(f"{FOUR}[clipped, EP 2]"),
    Mutant("split-divided-by-fsdp-too", 21, SHARDS)
    .replaces("part.set_gradient_divide_factor(1.0)", "part.set_gradient_divide_factor(2.0)")
    .caught_by(f"{FOUR}[clipped, EP 2]"),
    Mutant("split-experts-over-the-wrong-group", 25, SHARDS)
    .replaces('split_over(context.mesh["edp"], 1)', 'split_over(context.mesh["ep"], 1)')
    .caught_by(f"{FOUR}[clipped, EP 2]"),
    Mutant("split-copies-counted-twice", 22, SHARDS)
    .replaces("if placement.is_replicate()), 1)", "if placement.is_replicate() and size == 0), 1)")
    .caught_by(f"{FOUR}[norm, recompute, hybrid, EP 1]"),
    Mutant("split-gate-rounded", 28, SHARDS)
    .replaces("            gather_as_kept(part, in_float32)\n", "")
    .caught_by(f"{RUNS}::test_under_bf16_mixed_matrices_are_gathered_in_bfloat16_and_gates_in_float32"),
    Mutant("split-scales-rounded", 28, "scmoe/models/units.py")
    .replaces("if math.prod(p.shape[1:]) == 1}", "if p.dim() < 2}")
    .caught_by(f"{DIST}/test_swin_equality.py::test_under_bf16_mixed_scales_are_gathered_in_float32"),
    Mutant("split-experts-gathered-in-the-stream", 0, SHARDS)
    .replaces(
        "blocks, whole = units(module), [module]",
        "apart = [[m] for m in module.modules() if type(m).__name__ == 'Experts']\n"
        "    blocks, whole = apart + units(module), [module]",
    )
    .caught_by(f"{RUNS}::test_fsdp_starts_no_collective_inside_an_open_stream"),
    Mutant("whole-weights-after-validation", 41, "scmoe/lightning/lockstep.py")
    .replaces("        reshard(self.trainer.lightning_module)  #", "        assert self.trainer  #")
    .caught_by(f"{RUNS}::test_a_users_own_module_is_split_and_equal_to_replicated"),
    Mutant("split-experts-saved-as-whole", 71, f"{PARALLEL}/checkpoint/state.py")
    .replaces("over_edp = Shard(1) if isinstance(experts, DTensor) else Replicate()", "over_edp = Replicate()")
    .caught_by(f"{FAULTS}/test_sharded.py::test_71_a_checkpoint_of_any_layout_is_read_in_any_other[layouts0]"),
    Mutant("whole-before-it-is-split", 0, "scmoe/training/assembly/model.py")
    .replaces(
        '        with torch.device("meta"):\n            model = build_network',
        "        with torch.device(device):\n            model = build_network",
    )
    .caught_by(BUILT),
    Mutant("files-read-whole", 0, "scmoe/init_from/upcycle.py")
    .replaces(
        "    for name, source in found.items():\n",
        "    whole = [checkpoint.read(source, None) for source in found.values()]\n"
        "    for name, source in found.items():\n",
    )
    .caught_by(BUILT),
    Mutant("experts-read-by-local-number", 0, "scmoe/init_from/upcycle.py")
    .replaces("zip(module.expert_ids, own[name], strict=True)", "enumerate(own[name])")
    .caught_by(BUILT),
    Mutant("buffers-stay-on-meta", 0, "scmoe/models/swin.py")
    .replaces("torch.empty_like(buffer, device=self.attention.proj.weight.device)", "torch.empty_like(buffer)")
    .caught_by(f"{DIST}/test_swin_equality.py::test_two_ranks_equal_one[pos2, sharded]"),
    Mutant("split-otherwise-accepted", 74, "scmoe/parallel/dense.py")
    .replaces("if first is not None and found != wanted:", "if first is None and found != wanted:")
    .caught_by(f"{FAULTS}/test_sharded.py::test_74_a_module_that_is_split_is_not_trained_as_replicated"),
    Mutant("split-sums-read-too-early", 21, f"{PARALLEL}/update/wrap.py")
    .replaces("p.grad is not None or p.dtype", "p.dtype")
    .caught_by(f"{FOUR}[clipped, EP 2]", f"{UNIT}/test_pacing.py::test_sums_that_are_read_at_once_are_waited_for"),
    Mutant("split-backward-ends-before-its-sums", 21, f"{PARALLEL}/update/wrap.py")
    .replaces("            yield\n            self.wait()", "            yield")
    .caught_by(f"{UNIT}/test_pacing.py::test_backward_of_split_weights_goes_on_until_one_units_sums_are_missing"),
    Mutant("split-weights-gathered-one-after-another", 0, SHARDS)
    .replaces("    prefetch(module)\n", "")
    .caught_by(f"{RUNS}::test_weights_are_gathered_while_the_unit_before_computes"),
)
