"""These bugs are in how a run stops, fails, logs and reads its configuration."""

from __future__ import annotations

from tests.mutation.mutant import DATA, DIST, FAULTS, PARALLEL, UNIT, Mutant

RUN, RUN_FILES = "scmoe/training/run", f"{FAULTS}/test_run_files.py"
MUTANTS = (
    # ------------------------------------------------------------------ stopping
    Mutant("stop-requests-not-shared", 12, "scmoe/lightning/lockstep.py")
    .replaces(
        "(dist.all_reduce(sums, group=self.group, async_op=True), sums)",
        "(dist.all_reduce(sums.clone(), group=self.group, async_op=True), sums)",
    )
    .caught_by(f"{DIST}/test_poll.py"),
    Mutant("sigterm-ignored-during-validation", 12, "scmoe/lightning/lockstep.py")
    .replaces("            self.polls_left = int(fewest)\n", "            self.polls_left = 0\n")
    .caught_by(f"{FAULTS}/test_stop.py::test_12_sigterm_during_validation_stops_the_run_there[1]"),
    Mutant("stopped-validation-not-repeated", 12, "scmoe/lightning/seam.py")
    .replaces(
        "        progress.reset()\n    if is_fitting(trainer) and trainer.validating:\n",
        "        assert progress.current.started\n    if is_fitting(trainer) and trainer.validating is None:\n",
    )
    .caught_by(f"{FAULTS}/test_stop.py::test_12_sigterm_during_validation_stops_the_run_there[1]"),
    Mutant("best-checkpoint-lost-after-stop", 12, "scmoe/lightning/lockstep.py")
    .replaces(
        "        self.has_begun = False\n        self.ask",
        "        seam.mark_step_as_saved(self.module.trainer)\n        self.ask",
    )
    .caught_by(f"{FAULTS}/test_stop.py::test_12_a_stop_during_validation_loses_no_best_checkpoint[4]"),
    Mutant("sigterm-left-to-lightning", 12, "scmoe/lightning/seam.py")
    .replaces("        if number not in (signal.SIGTERM, signal.SIGINT):\n", "        if number:\n")
    .caught_by(f"{FAULTS}/test_stop_any_time.py::test_12_sigterm_in_an_evaluation_ends_it_and_saves_nothing[test]"),
    Mutant("no-poll-after-last-step", 12, "scmoe/lightning/lockstep.py")
    .replaces("            self.ask_and_wait()  # so that", "            assert self.stop  # so that")
    .caught_by(
        f"{FAULTS}/test_stop_any_time.py::"
        "test_12_sigterm_before_the_first_step_or_after_the_last_is_not_lost[after the last step]"
    ),
    Mutant("sigterm-flag-without-polls", 12, "scmoe/lightning/lockstep.py")
    .replaces(
        "                self.ask_and_wait()\n            self.stop.give_back()\n",
        "                self.ask_and_wait()\n",
    )
    .caught_by(f"{FAULTS}/test_stop_any_time.py::test_12_where_ranks_cannot_ask_each_other_a_process_ends_at_once"),
    Mutant("early-validation-after-stop", 12, "scmoe/lightning/lockstep.py")
    .replaces("            seam.forget_started_batch(trainer)\n", "")
    .caught_by(f"{FAULTS}/test_stop.py::test_12_a_resumed_run_validates_after_the_same_steps"),
    Mutant("ctrl-c-not-handled", 12, "scmoe/lightning/lockstep.py")
    .replaces("SIGNALS = (signal.SIGTERM, signal.SIGINT)", "SIGNALS = (signal.SIGTERM,)")
    .caught_by(f"{FAULTS}/test_stop.py::test_12_ctrl_c_stops_the_run_as_sigterm_does"),
    # ------------------------------------------------------------------ ordinary use
    Mutant("last-step-not-saved", 38, "scmoe/lightning/seam.py")
    .replaces("        if self.save_top_k and self._last", "        if not self.save_top_k and self._last")
    .caught_by(f"{RUN_FILES}::test_38_a_finished_run_has_the_checkpoint_of_its_summary"),
    Mutant("older-step-kept-after-resume", 38, "scmoe/lightning/seam.py")
    .replaces("int(step[1]) < trainer.global_step:", "int(step[1]) < 0:")
    .caught_by(f"{RUN_FILES}::test_38_a_resumed_run_keeps_only_its_own_last_step"),
    Mutant("resume-accepts-another-experiment", 39, f"{RUN}/resume.py")
    .replaces("not key.startswith(MAY_CHANGE)", 'key.startswith("model.")')
    .caught_by(f"{RUN_FILES}::test_39_another_model_or_experiment_is_refused_and_nothing_is_written"),
    Mutant("resume-overwrites-config", 39, f"{RUN}/resume.py")
    .replaces('run_dir / f"config-from-{step}.yaml"', 'run_dir / ("config.yaml" if step else "")')
    .caught_by(f"{RUN_FILES}::test_39_a_resumption_keeps_its_config_beside_the_first_one"),
    Mutant("weights-read-with-edited-config", 39, f"{RUN}/resume.py")
    .replaces("    if text is None:\n", "    if checkpoint:\n")
    .caught_by(f"{RUN_FILES}::test_39_weights_have_the_settings_that_they_were_trained_with"),
    Mutant("every-rank-opens-the-run", 40, "scmoe/training/run/train.py")
    .replaces("    if not is_rank_zero():\n", "    if False:\n")
    .caught_by(f"{RUN_FILES}::test_40_only_rank_0_writes_into_the_run_directory"),
    Mutant("one-rank-saves-after-exception", 13, "scmoe/lightning/strategy.py")
    .replaces(
        "        return self.context.world_size > 1 and seam.was_interrupted(self.module.trainer)\n",
        "        return self.context.world_size < 1 and seam.was_interrupted(self.module.trainer)\n",
    )
    .caught_by(f"{FAULTS}/test_guards.py::test_13_callbacks_that_save_after_an_exception_wait_for_no_rank"),
    Mutant("link-to-skipped-save", 13, "scmoe/lightning/strategy.py")
    .replaces("super().is_global_zero and not self.is_alone", "super().is_global_zero")
    .caught_by(
        f"{FAULTS}/test_guards.py::test_13_callbacks_that_save_after_an_exception_wait_for_no_rank[0-save_on_exception]"
    ),
    Mutant("ranks-poll-unequal-times", 16, "scmoe/lightning/lockstep.py")
    .replaces("self.poll.smallest(sum(batches))", "sum(batches)")
    .caught_by(f"{FAULTS}/test_stop.py::test_12_ranks_with_different_numbers_of_validation_batches_agree_too"),
    # ------------------------------------------------------------------ ranks and workers that fail
    Mutant("roll-call-omits-missing-ranks", 14, "scmoe/lightning/roll_call.py")
    .replaces(
        "        except RuntimeError:\n            absent.append(rank)\n    return",
        "        except RuntimeError:\n            pass\n    return",
    )
    .caught_by(f"{FAULTS}/test_guards.py::test_14_a_roll_call_names_the_missing_ranks"),
    Mutant("groups-ignore-timeout", 14, f"{PARALLEL}/mesh.py")
    .replaces("ranks.tolist(), timeout=timeout, group_desc", "ranks.tolist(), group_desc")
    .caught_by(f"{FAULTS}/test_guards.py::test_14_no_group_waits_longer_than_the_timeout"),
    Mutant("different-collectives-not-reported", 15, "scmoe/lightning/debug.py")
    .replaces("        if len(set(of_ranks)) > 1:\n", "        if len(set(of_ranks)) > 2:\n")
    .caught_by(f"{FAULTS}/test_collectives.py::test_15_collectives_in_another_order_are_named"),
    Mutant("object-collectives-not-compared", 15, "scmoe/lightning/debug.py")
    .replaces("for name in (*TENSORS, *OBJECTS)),", "for name in TENSORS),")
    .caught_by(f"{FAULTS}/test_collectives.py::test_15_every_kind_of_collective_is_watched"),
    Mutant("uneven-batches-accepted", 16, "scmoe/lightning/lockstep.py")
    .replaces("    if context.world_size == 1:\n", "    if context.world_size > 1:\n")
    .caught_by(f"{FAULTS}/test_batches.py::test_16_each_loader_is_counted"),
    Mutant("dead-worker-sample-unknown", 19, f"{DATA}/positioned.py")
    .replaces(
        "            self.reading_W2[worker.id] = torch.tensor([os.getpid(), i])\n",
        "            assert worker.id < len(self.reading_W2)\n",
    )
    .caught_by(f"{FAULTS}/test_batches.py::test_19_a_data_worker_that_fails_is_named_with_its_sample"),
    # ------------------------------------------------------------------ logging and secrets
    Mutant("killed-wandb-ends-run", 32, "scmoe/training/run/wandb_logger.py")
    .replaces("WANDB_TROUBLE = (wandb.Error, OSError)", "WANDB_TROUBLE = (wandb.errors.CommError,)")
    .caught_by(f"{FAULTS}/test_logging.py::test_32_a_killed_wandb_process_does_not_end_the_run"),
    Mutant("new-column-without-header", 32, "scmoe/training/run/loggers.py")
    .replaces("            writer.metrics_keys = keys\n", "            assert isinstance(keys, list)\n")
    .caught_by(f"{FAULTS}/test_logging.py::test_32_a_full_disk_ends_no_run_that_logs"),
    Mutant("unwritable-picture-ends-run", 32, "scmoe/training/files.py")
    .replaces('        warn_once(f"{path} is not written: {error.strerror or error}")\n', "        raise\n")
    .caught_by(f"{FAULTS}/test_logging.py::test_32_a_run_on_a_full_disk_loses_its_figures_and_ends_normally"),
    Mutant("environment-variables-stored", 33, "scmoe/training/run/directory.py")
    .replaces(
        '        "cpus": os.cpu_count(),\n', '        "cpus": os.cpu_count(),\n        "variables": dict(os.environ),\n'
    )
    .caught_by(f"{FAULTS}/test_security.py::test_33_a_key_is_in_no_file_of_a_run"),
    Mutant("git-diff-stores-keys", 33, "scmoe/training/run/directory.py")
    .replaces('        "git_diff": redacted(git("diff", "HEAD")),\n', '        "git_diff": git("diff", "HEAD"),\n')
    .caught_by(f"{FAULTS}/test_security.py::test_33_keys_in_the_command_line_and_the_code_are_redacted"),
    Mutant("wandb-stores-command-line", 33, "scmoe/training/run/wandb_logger.py")
    .replaces("x_disable_meta=redacted(sys.argv) != sys.argv,", "x_disable_meta=False,")
    .caught_by(f"{FAULTS}/test_security.py::test_33_keys_in_the_command_line_and_the_code_are_redacted"),
    Mutant("dtype-not-checked", 34, f"{PARALLEL}/checkpoint/state.py")
    .replaces("        assert isinstance(dtype, torch.dtype)\n", "        assert dtype is not None\n")
    .caught_by(f"{FAULTS}/test_security.py::test_34_a_dtype_in_meta_must_be_a_dtype"),
    # ------------------------------------------------------------------ ordinary use
    Mutant("plan-of-other-ranks-taken", 43, "scmoe/training/callbacks/adaptive_schedule.py")
    .replaces("if there.get(key) != value]:", "if there.get(key) is None]:")
    .caught_by(f"{FAULTS}/test_kept_plan.py::test_43_a_plan_of_other_conditions_is_measured_again"),
    Mutant("skipped-images-not-counted", 44, f"{DATA}/images.py")
    .replaces('"position": position, "skipped": skipped}', '"position": position, "skipped": 0}')
    .caught_by(
        f"{FAULTS}/test_bad_data.py::test_44_damaged_images_are_replaced_in_training_left_out_of_validation_and_counted"
    ),
    Mutant("memory-of-all-for-each-rank", 47, f"{RUN}/machine.py")
    .replaces("memory_in_use()) / GIB / devices\n", "memory_in_use()) / GIB\n")
    .caught_by(f"{FAULTS}/test_machine.py::test_47_the_limit_of_memory_is_a_ranks_share"),
    Mutant("launcher-not-asked", 50, f"{RUN}/machine.py")
    .replaces("        if launcher.detect():\n", "        if not launcher:\n")
    .caught_by(f"{FAULTS}/test_machine.py::test_50_ranks_that_nobody_starts_are_not_waited_for"),
    Mutant("pure-float16-accepted", 54, "scmoe/lightning/guarded_update.py")
    .replaces('plugin.precision in ("16-true", "16-mixed")', 'plugin.precision == "16-mixed"')
    .caught_by(f"{FAULTS}/test_lightning_users.py::test_54_float16_without_a_scaler_is_refused_too"),
    Mutant("damaged-directory-read", 56, f"{PARALLEL}/checkpoint/loading.py")
    .replaces(
        "    durable.verify(path)\n    meta = read_meta(path)\n    meta.pop", "    meta = read_meta(path)\n    meta.pop"
    )
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_56_a_damaged_directory_is_refused_and_other_checkpoints_are_read_as_before"
    ),
    Mutant("averaging-copies-accepted", 57, "scmoe/lightning/guarded_update.py")
    .replaces("        if isinstance(callback, COPYING):\n", "        if callback is COPYING:\n")
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_57_callbacks_that_average_weights_in_a_copy_are_refused_by_name"
    ),
    # ------------------------------------------------------------------ configuration
    Mutant("run-name-leaves-root", 36, "scmoe/config/rules.py")
    .replaces("NAME.fullmatch(config.name)", "NAME.search(config.name)")
    .caught_by(f"{UNIT}/test_config.py::test_impossible_combination_names_its_key"),
    Mutant("interpolation-allowed", 35, "scmoe/config/load.py")
    .replaces('if any("${" in text or text == "???" for text in texts):', 'if any(text == "???" for text in texts):')
    .caught_by(f"{UNIT}/test_config.py::test_bad_override"),
    Mutant("tags-allowed", 35, "scmoe/config/load.py")
    .replaces("(yaml.TagToken, yaml.AnchorToken, yaml.AliasToken)", "(yaml.AnchorToken, yaml.AliasToken)")
    .caught_by(f"{UNIT}/test_config.py::test_bad_file_is_named"),
    Mutant("experts-not-divisible", 37, "scmoe/config/rules.py")
    .replaces("moe.num_experts % ep_size\n", "moe.num_experts < ep_size\n")
    .caught_by(f"{UNIT}/test_config.py::test_impossible_combination_names_its_key"),
    Mutant("initial-weights-checked-late", 0, "scmoe/training/run/train.py")
    .replaces(
        "        initial_weights(config, build_model_on_meta(config))  # its checks, before data is prepared",
        "        pass",
    )
    .caught_by(
        "tests/faults/test_machine.py::test_52_initial_weights_that_do_not_fit_are_refused_before_data_is_prepared"
    ),
    Mutant("skipped-files-fail-the-gate", 0, "experiments/check_data.py")
    .replaces('    elif settings.data.on_error == "skip":', "    elif False:")
    .caught_by("tests/faults/test_bad_data.py::test_45_check_data_reads_texts_too"),
    Mutant("saved-steps-not-counted", 0, "scmoe/runs/seen.py")
    .replaces("[*logged, *saved]", "logged")
    .caught_by("tests/unit/test_runs.py::test_steps_that_are_saved_count_where_they_are_not_logged"),
    Mutant("dangling-links-passed-over", 0, "datamodules/sources.py")
    .replaces("file.is_file() or not file.exists()", "file.is_file()")
    .caught_by("tests/faults/test_bad_data.py::test_44_a_link_to_a_text_that_is_gone_is_named"),
    Mutant("ctrl-c-left-to-lightning", 0, "scmoe/lightning/seam.py")
    .replaces("not in (signal.SIGTERM, signal.SIGINT)", "not in (signal.SIGTERM,)")
    .caught_by("tests/faults/test_lightning_users.py::test_12_after_a_run_ctrl_c_and_sigterm_do_what_they_did_before"),
    Mutant("timeout-of-the-start-stays", 0, "scmoe/lightning/strategy.py")
    .replaces("        set_default_timeout(self.timeout)\n", "        set_default_timeout(self.start_timeout)\n")
    .caught_by("tests/faults/test_guards.py::test_14_no_group_waits_longer_than_the_timeout"),
    Mutant("no-time-to-start", 0, "scmoe/lightning/strategy.py")
    .replaces('"timeout": self.start_timeout}', '"timeout": self.timeout}')
    .caught_by("tests/faults/test_guards.py::test_14_no_group_waits_longer_than_the_timeout"),
    Mutant("launched-rank-ends-with-130", 0, "scmoe/runs/on_ranks.py")
    .replaces(
        "SystemExit(0 if trainer.strategy.is_launched else 128 + signal.SIGINT)", "SystemExit(128 + signal.SIGINT)"
    )
    .caught_by("tests/faults/test_generation.py::test_62_ctrl_c_is_the_exit_code_of_rank_0_alone"),
    Mutant("run-of-another-machine-taken", 0, "scmoe/training/run/directory.py")
    .replaces("    return time.time() - path.stat().st_mtime <= SILENT_S\n", "    return False\n")
    .caught_by("tests/unit/test_runs.py::test_a_run_that_another_machine_trains_cannot_be_resumed_until_it_is_silent"),
    Mutant("passwords-kept", 0, "scmoe/training/files.py")
    .replaces("|_PWD|", "|PWD|")
    .caught_by("tests/faults/test_security.py::test_33_a_variable_that_holds_a_key_is_known_by_its_name"),
    Mutant("nccl-order-forced", 0, "scmoe/parallel/mesh.py")
    .replaces(
        'os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")', 'os.environ.update(NCCL_LAUNCH_ORDER_IMPLICIT="1")'
    )
    .caught_by(
        "tests/unit/test_groups.py::test_nccl_starts_kernels_in_the_order_of_their_launch_unless_the_user_has_chosen"
    ),
)
