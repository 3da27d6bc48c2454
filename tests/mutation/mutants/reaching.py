"""These bugs lose a value on its way from a configuration, or count what a report says wrongly."""

from __future__ import annotations

from tests.mutation.mutant import UNIT, Mutant

BUILD, TABLE = "scmoe/training/assembly", "experiments/studies/table"
REACHES = f"{UNIT}/test_config_reaches.py"

MUTANTS = (
    Mutant("z-loss-not-passed-on", 0, f"{BUILD}/model.py")
    .replaces("z_loss_coef=config.moe.z_loss_coef,", "z_loss_coef=0.0,")
    .caught_by(f"{REACHES}::test_the_module_has_the_values_of_the_config"),
    Mutant("betas-not-passed-on", 0, f"{BUILD}/model.py")
    .replaces("betas = config.optim, (config.optim.beta1, config.optim.beta2)", "betas = config.optim, (0.9, 0.95)")
    .caught_by(f"{REACHES}::test_the_optimizer_has_the_values_of_the_config"),
    Mutant("mixup-not-passed-on", 0, f"{BUILD}/data.py")
    .replaces("mixup=data.mixup,", "mixup=0.0,")
    .caught_by(f"{REACHES}::test_each_change_of_images_changes_the_first_batch[mixup=0.8]"),
    Mutant("dropout-of-the-embedding-alone", 0, f"{BUILD}/blocks.py")
    .replaces("after=lambda: nn.Dropout(model.dropout),", "after=nn.Identity,")
    .caught_by(f"{REACHES}::test_dropout_follows_the_embedding_and_every_sublayer[top_k]"),
    Mutant("settings-of-a-table-overridden", 0, "experiments/studies/table/table_runs.py")
    .replaces("[*(row.overrides for row in table.rows), *scale.settings.values()]", "[r.overrides for r in table.rows]")
    .caught_by(f"{UNIT}/test_table_runs.py::test_an_override_of_what_a_row_or_its_setting_sets_is_refused"),
    Mutant("values-correlated-over-two-models", 0, "experiments/studies/table/table_report.py")
    .replaces(
        '(row["paper"]["difference"], row["minus_baseline"]) for row in found["rows"] if row["minus_baseline"]',
        '(row["paper"][found["metric"]], row["ours"]) for row in found["rows"]',
    )
    .caught_by(f"{UNIT}/test_table_report.py::test_the_order_of_a_table_with_two_models_is_that_of_differences"),
    Mutant("resumed-job-without-its-extensions", 0, "experiments/studies/jobs.py")
    .replaces("str(run_dir), *self.again]", "str(run_dir)]")
    .caught_by(f"{UNIT}/test_table_make.py::test_a_run_with_extensions_is_resumed_and_evaluated_with_them"),
    Mutant("nan-is-a-value", 0, "experiments/studies/sweep/search.py")
    .replaces("self.history and math.isfinite(self.history[-1]) else None", "self.history else None")
    .caught_by(f"{UNIT}/test_sweep_search.py::test_a_trial_that_ends_with_nan_teaches_bayes_nothing"),
    Mutant("samples-outside-the-precision", 0, "scmoe/training/run/printout.py")
    .replaces("with trainer.precision_plugin.val_step_context(), eager:", "with eager:")
    .caught_by(
        "tests/smoke/test_train_options.py::test_a_text_run_with_split_weights_in_half_precision_ends_with_samples"
    ),
    Mutant("muon-on-parts-of-matrices", 0, "scmoe/config/rules.py")
    .replaces('config.optim.name == "muon" and config.strategy.dense != "replicated"', "False")
    .caught_by("tests/faults/test_sharded.py::test_74_a_layout_that_cannot_be_is_refused_by_key"),
    Mutant("a-ceiling-for-each-chunk", 31, "scmoe/parallel/wire/all_to_all_dispatcher.py")
    .replaces(
        "check_ceiling(rows.sum((0, 1)).tolist(), self.ceiling)",
        "[check_ceiling(r, self.ceiling) for r in rows.sum(0).tolist()]",
    )
    .caught_by("tests/faults/test_ceiling.py::test_31_chunks_do_not_change_what_a_ceiling_allows"),
    Mutant("pairs-for-scmoes-names-alone", 0, f"{BUILD}/blocks.py")
    .replaces("block.architecture in SHORTCUTS", "config.moe.architecture in SHORTCUTS")
    .caught_by(f"{UNIT}/test_extensions.py::test_an_architecture_may_reuse_pairs_and_bring_a_router"),
    Mutant("offloaded-on-all-threads", 0, "scmoe/runs/trained.py")
    .replaces("    torch.set_num_threads(cpu_threads(config))\n", "")
    .caught_by("tests/distributed/test_generation.py::test_offloaded_experts_write_the_same_texts"),
    Mutant("every-machine-has-a-rank-0", 0, "scmoe/training/run/machine.py")
    .replaces("rank_without_trainer() == 0 and node == 0", "rank_without_trainer() == 0")
    .caught_by("tests/faults/test_machine.py::test_49_only_the_first_machines_first_process_is_rank_0"),
    Mutant("gradients-of-earlier-batches-forgotten", 0, "scmoe/footprint/memory.py")
    .replaces('"total": 2 * weights + optimizer', '"total": weights + optimizer')
    .caught_by(f"{UNIT}/test_memory.py::test_state_has_exactly_the_bytes_of_a_real_rank"),
    Mutant("comment-cuts-a-value", 0, "scmoe/config/load.py")
    .replaces('if "#" in text and', "if False and")
    .caught_by(f"{UNIT}/test_config.py::test_bad_override"),
)
