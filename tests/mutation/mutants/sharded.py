"""These bugs make a run with split dense weights differ from one process, or slower than its schedule says."""

from __future__ import annotations

from tests.mutation.mutant import DIST, FAULTS, PARALLEL, Mutant

FOUR = f"{DIST}/test_sharded.py::test_four_ranks_equal_one"
RUNS = f"{DIST}/test_sharded_runs.py"
SHARDS = f"{PARALLEL}/dense_shards.py"

MUTANTS = (
    Mutant("split-loss-not-divided", 21, f"{PARALLEL}/dense_strategy.py")
    .replaces("closure_loss / self.world_size if", "closure_loss if")
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
    Mutant("split-experts-gathered-in-the-stream", 0, SHARDS)
    .replaces(
        "blocks, whole = units(module), [module]",
        "apart = [[m] for m in module.modules() if type(m).__name__ == 'Experts']\n"
        "    blocks, whole = apart + units(module), [module]",
    )
    .caught_by(f"{RUNS}::test_fsdp_starts_no_collective_inside_an_open_stream"),
    Mutant("whole-weights-after-validation", 41, f"{PARALLEL}/job/lockstep.py")
    .replaces("        reshard(self.module)  #", "        assert self.module  #")
    .caught_by(f"{RUNS}::test_a_users_own_module_is_split_and_equal_to_replicated"),
    Mutant("split-experts-saved-as-whole", 71, f"{PARALLEL}/checkpoint/state.py")
    .replaces("over_edp = Shard(1) if isinstance(experts, DTensor) else Replicate()", "over_edp = Replicate()")
    .caught_by(f"{FAULTS}/test_sharded.py::test_71_a_checkpoint_of_any_layout_is_read_in_any_other[layouts0]"),
    Mutant("split-otherwise-accepted", 74, f"{PARALLEL}/dense_strategy.py")
    .replaces("if first is not None and found != wanted:", "if first is None and found != wanted:")
    .caught_by(f"{FAULTS}/test_sharded.py::test_74_a_module_that_is_split_is_not_trained_as_replicated"),
)
