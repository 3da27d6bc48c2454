"""These bugs are in what a run shows of itself, how far it goes, and how its model leaves this project."""

from __future__ import annotations

from tests.mutation.mutant import DATA, DIST, UNIT, Mutant

CALLBACKS, RUN, OPTIONS = "scmoe/training/callbacks", "scmoe/training/run", "tests/smoke/test_train_options.py"
DRY_RUN = "experiments/dryrun"
HF, PEERS = "scmoe/runs", "tests/peers/test_hf_export.py"
MUTANTS = (
    Mutant("norm-of-experts-not-averaged", 0, "scmoe/parallel/update/guard.py")
    .replaces("total_norm(gradients, device).square() / holders", "total_norm(gradients, device).square()")
    .caught_by(f"{DIST}/test_gradient_norms.py"),
    Mutant("norm-of-experts-of-one-rank", 0, "scmoe/training/callbacks/measurements.py")
    .replaces("context.sum_over_ranks(parts_K)", "parts_K")
    .caught_by(f"{DIST}/test_gradient_norms.py"),
    Mutant("step-times-wait-for-the-device", 0, "scmoe/training/callbacks/measurements.py")
    .replaces("return isinstance(mark, float) or mark.query()", "return True")
    .caught_by(f"{UNIT}/test_step_times.py"),
    Mutant("validation-counts-as-data-time", 0, f"{CALLBACKS}/measurements.py")
    .replaces(
        "    def on_validation_start(self, *_: Any) -> None:\n        self.left",
        "    def unused(self) -> None:\n        self.left",
    )
    .caught_by(f"{UNIT}/test_step_times.py"),
    Mutant("mfu-counts-empty-slots", 0, "scmoe/footprint/model_cost.py")
    .replaces("if empty_slots else copies)", "if True else copies)")
    .caught_by(f"{UNIT}/test_step_times.py"),
    Mutant("freed-storages-count", 0, f"{DRY_RUN}/counting.py")
    .replaces("weakref.finalize(storage, self._resize, key, None)", "self.sizes[key] = self.sizes[key]")
    .caught_by(f"{UNIT}/test_dry_run.py::test_counting_equals_torchs_tracker_where_its_hooks_hold_nothing"),
    Mutant("all-reduce-sends-once", 0, f"{DRY_RUN}/counting.py")
    .replaces('(1 + (name == "allreduce_")) * max(sizes)', "max(sizes)")
    .caught_by(f"{UNIT}/test_dry_run.py"),
    Mutant("last-block-is-gathered-twice", 0, f"{DRY_RUN}/estimated.py")
    .replaces("1 if p in split.outside or p in split.blocks[-1] else 2", "1 if p in split.outside else 2")
    .caught_by(f"{UNIT}/test_dry_run.py"),
    Mutant("loss-has-no-gradients", 0, "scmoe/footprint/memory.py")
    .replaces("kept + 3 * logits", "kept + logits")
    .caught_by(f"{UNIT}/test_memory.py"),
    Mutant("load-table-keeps-rows-that-come-again", 0, f"{CALLBACKS}/expert_load.py")
    .replaces("if int(row[0]) < trainer.global_step", "if row")
    .caught_by(f"{UNIT}/test_expert_load.py"),
    Mutant("overfit-reads-all-data", 0, f"{DATA}/order.py")
    .replaces("self.order(positions % self.period)", "self.order(positions)")
    .caught_by(f"{OPTIONS}::test_overfitting_repeats_the_first_batches_also_when_it_is_resumed"),
    Mutant("best-checkpoint-is-the-worst", 0, f"{RUN}/resume.py")
    .replaces("key=scores.__getitem__, reverse=True", "key=scores.__getitem__")
    .caught_by(f"{OPTIONS}::test_the_best_validations_are_kept_and_the_best_one_is_found"),
    Mutant("later-checkpoints-stay", 0, f"{RUN}/resume.py")
    .replaces('if read_manifest(path)["step"] > step:', "if step < 0:")
    .caught_by(f"{OPTIONS}::test_a_run_goes_on_from_a_chosen_step_as_it_did_before"),
    Mutant("exported-gate-always-renormalises", 0, "scmoe/runs/hf_folder.py")
    .replaces('"norm_topk_prob": moe.renormalise and moe.top_k > 1', '"norm_topk_prob": True')
    .caught_by(f"{PEERS}::test_logits_and_weights"),
    Mutant("exported-queries-cut-in-thirds", 0, "scmoe/init_from/families.py")
    .replaces('sizes = [settings["model.dim"], keys, keys]', "assert keys")
    .caught_by(f"{PEERS}::test_logits_and_weights"),
    Mutant("loaded-model-drops-tokens", 0, "scmoe/runs/hf_folder.py")
    .replaces("replace(config.moe, capacity_factor=None, ", "replace(config.moe, ")
    .caught_by(f"{DIST}/test_export.py::test_a_run_of_two_ranks_is_loaded_from_any_form"),
    Mutant("values-on-bars", 0, "scmoe/probes/charts.py")
    .replaces("axis.text(1.02 * end, y, bar.text", "axis.text(0.5 * bar.value, y, bar.text")
    .caught_by(f"{UNIT}/test_pictures.py::test_the_pictures_of_the_docs_are_readable"),
    Mutant("digest-without-values", 0, "scmoe/probes/charts.py")
    .replaces("return paths, numbers(part.get_offsets()), numbers(part.get_edgecolor())", "return len(paths)")
    .caught_by(f"{UNIT}/test_pictures.py::test_a_picture_is_stale_if_a_value_a_name_or_a_colour_has_changed"),
    Mutant("hf-padding-attended", 0, "scmoe/hf.py")
    .replaces("mask_BL[:, None, None] & (keys_L < queries_S1)", "(keys_L < queries_S1)")
    .caught_by("tests/peers/test_hf_export.py::test_padding_on_the_left_changes_no_token"),
    Mutant("hf-loss-of-each-batch", 0, "scmoe/hf.py")
    .replaces("loss * counted / num_items_in_batch", "loss")
    .caught_by("tests/peers/test_hf_export.py::test_losses_of_accumulated_batches_add_up_to_that_of_one_batch"),
    Mutant("hf-missing-weights-unset", 0, "scmoe/hf.py")
    .replaces("                p.copy_(weight)", "                pass")
    .caught_by("tests/peers/test_hf_export.py::test_weights_that_a_folder_lacks_are_drawn_as_for_a_training"),
    Mutant("card-of-a-user-replaced", 0, "scmoe/runs/hf_folder.py")
    .replaces('if not (folder / "README.md").exists():', "if True:")
    .caught_by("tests/peers/test_hf_export.py::test_the_model_card_says_what_the_model_is_and_loads_it"),
    Mutant("written-answers-lose-the-question", 0, "scmoe/runs/evaluate/lm_eval_adapter.py")
    .replaces("[new - longest :]", "[-longest:]")
    .caught_by("tests/unit/test_evaluate_tasks.py::test_answers_that_the_model_writes_are_those_of_generate"),
    Mutant("failed-trial-at-another-category", 0, "experiments/studies/sweep/sweep_report.py")
    .replaces("if judged and numeric else (-math.inf, math.inf)", "if judged else (-math.inf, math.inf)")
    .caught_by("tests/unit/test_sweep_search.py::test_a_failed_trial_stands_at_its_own_category"),
    Mutant("equal-curves-hidden", 0, "experiments/studies/compare.py")
    .replaces("twins = curves.count(own)", "twins = 0")
    .caught_by("tests/unit/test_runs.py::test_every_run_of_a_comparison_is_seen"),
    Mutant("batches-not-pinned", 0, "datamodules/positioned.py")
    .replaces("pin_memory=on_gpu,", "pin_memory=False,")
    .caught_by("tests/unit/test_text.py::test_batches_for_a_gpu_lie_in_pinned_memory"),
    Mutant("wide-bar-in-a-narrow-terminal", 0, "scmoe/lightning/seam.py")
    .replaces('>= WIDE else "\\n"', '>= 0 else "\\n"')
    .caught_by("tests/unit/test_private_names.py::test_a_narrow_terminal_shows_each_metric_beside_its_value"),
)
