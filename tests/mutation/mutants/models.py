"""These bugs are in models, weights from elsewhere, optimizer settings and the tools around training."""

from __future__ import annotations

from tests.mutation.mutant import DATA, DIST, MOE, ORACLE, UNIT, Mutant

FAKE_CUDA = f"{UNIT}/test_fake_cuda.py::test_a_training_step_stays_on_its_device"

MUTANTS = (
    # ------------------------------------------------------------------ training
    Mutant("module-does-not-pickle", 0, "scmoe/training/assembly/model.py")
    .replaces("partial(build_model_to_train, config),", "lambda context: build_model_to_train(config, context),")
    .caught_by(f"{UNIT}/test_build.py::test_a_module_can_be_sent_to_a_spawned_process"),
    Mutant("norm-weights-decay", 0, "scmoe/training/muon.py")
    .replaces('"weight_decay": 0.0}', '"weight_decay": weight_decay}')
    .caught_by(f"{UNIT}/test_module.py::test_matrices_decay_and_nothing_else"),
    # ------------------------------------------------------------------ a device
    Mutant("weights-drawn-on-the-device", 0, f"{MOE}/experts.py")
    .replaces('generator=generator, device="cpu")', "generator=generator)")
    .caught_by(f"{FAKE_CUDA}[gpt-pos2-32-true]"),
    Mutant("norm-of-nothing-on-the-host", 0, "scmoe/parallel/update/guard.py")
    .replaces(
        "torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)",
        "torch.nn.utils.get_total_norm(gradients)",
    )
    .caught_by(f"{FAKE_CUDA}[gpt-dense-32-true]"),
    Mutant("plugin-clips-by-the-norm", 0, "scmoe/lightning/guarded_update.py")
    .replaces('if clip_val > 0 and gradient_clip_algorithm == "norm":', "if False:")
    .caught_by(f"{UNIT}/test_module.py::test_the_norm_is_clipped_in_every_precision"),
    Mutant("number-of-tokens-on-the-host", 0, f"{MOE}/balance.py")
    .replaces("torch.full((), T, device=scores_TE.device)", "torch.full((), T)")
    .caught_by(f"{FAKE_CUDA}[gpt-pos2-32-true]"),
    # ------------------------------------------------------------------ LLaMA
    Mutant("keys-not-rotated", 0, "scmoe/blocks/sublayers.py")
    .replaces("self.rotary(k_BHSd, positions)", "k_BHSd")
    .caught_by(f"{ORACLE}::test_dense_equals_oracle[llama]"),
    Mutant("swiglu-backward-swapped", 0, f"{MOE}/activation.py")
    .replaces("dgate_RF, dup_RF = out_RF2.chunk(2, dim=-1)", "dup_RF, dgate_RF = out_RF2.chunk(2, dim=-1)")
    .caught_by(f"{UNIT}/test_activation.py::test_formula_and_derivative[swiglu]"),
    # ------------------------------------------------------------------ checkpoints from elsewhere
    Mutant("shared-expert-not-doubled", 0, "scmoe/init_from/upcycle.py")
    .replaces("return 2 * weight if", "return weight if")
    .caught_by(f"{UNIT}/test_upcycling.py::test_upcycled_equals_dense[pos2]"),
    Mutant("weights-written-before-checks", 0, "scmoe/init_from/upcycle.py")
    .replaces(
        "    if problems:\n        raise",
        "    for name, weight in found.items():\n        own[name].copy_(weight)\n    if problems:\n        raise",
    )
    .caught_by(f"{UNIT}/test_pretrained.py::test_nothing_is_written_where_a_tensor_is_missing"),
    Mutant("export-settings-not-compared", 0, "scmoe/training/assembly/model.py")
    .replaces("        check_settings(settings_of(config), checkpoint.settings)\n", "")
    .caught_by(f"{UNIT}/test_pretrained.py::test_an_export_into_another_model_is_refused_by_key"),
    Mutant("llama-prefix-kept", 0, f"{DATA}/tokenizer.py")
    .replaces("            inner = _without_prefix(inner)\n", "")
    .caught_by(f"{UNIT}/test_tokenizer.py::test_llamas_own_tokenizer_loses_nothing"),
    # ------------------------------------------------------------------ estimates and analyses
    Mutant("estimate-ignores-config-ranks", 0, "experiments/estimate.py")
    .replaces("        sizes = own | sizes\n", '        sizes = {"ep": 1, "dp": 1} | sizes\n')
    .caught_by(f"{UNIT}/test_counts.py::test_an_estimate_uses_the_configs_ranks_unless_others_are_given"),
    Mutant("analysis-of-one-rank", 0, "scmoe/training/callbacks/analysis.py")
    .replaces("total = module.parallel_context.sum_over_ranks(probe.result())", "total = probe.result()")
    .caught_by(f"{DIST}/test_analysis.py::test_two_ranks_measure_the_same_as_one"),
)
