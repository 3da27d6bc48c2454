"""These bugs damage checkpoints, or make ranks save, stop or fail in another way than together."""

from __future__ import annotations

from tests.mutation.mutant import CHECKPOINT, DIST, FAULTS, LIGHTNING, PARALLEL, UNIT, Mutant

LAYOUTS = (
    f"{DIST}/test_strategy.py"
    "::test_a_run_resumed_in_another_layout_equals_an_uninterrupted_one[2-1]"
)
KILLED = f"{UNIT}/test_durable.py::test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint"

MUTANTS = (
    # ------------------------------------------------------------------ checkpoints
    Mutant("commit-by-copying", f"{CHECKPOINT}/durable.py")
    .replaces(
        "        os.rename(partial, path)\n    elif",
        "        shutil.copytree(partial, path)\n        shutil.rmtree(partial)\n    elif",
    )
    .caught_by(
        f"{UNIT}/test_durable.py::test_a_kill_at_any_call_of_a_first_save_leaves_a_whole_checkpoint_or_none"
    ),
    Mutant("old-checkpoint-removed-first", f"{CHECKPOINT}/durable.py")
    .replaces("        os.rename(path, old)  #", "        shutil.rmtree(path)  #")
    .caught_by(KILLED),
    Mutant("manifest-checks-only-sizes", f"{CHECKPOINT}/durable.py")
    .replaces(" or fingerprint(path / name) == expected)", " or True)")
    .caught_by(f"{UNIT}/test_durable.py::test_any_flipped_bit_is_found"),
    Mutant("manifest-seal-not-checked", f"{CHECKPOINT}/durable.py")
    .replaces("    if written != text:\n", "    if written is None:\n")
    .caught_by(f"{UNIT}/test_durable.py::test_any_flipped_bit_is_found"),
    Mutant("foreign-shards-accepted", f"{CHECKPOINT}/durable.py")
    .replaces(
        'sorted(present ^ manifest["files"].keys())', 'sorted(manifest["files"].keys() - present)'
    )
    .caught_by(f"{UNIT}/test_durable.py::test_a_shard_of_another_save_is_refused"),
    Mutant("sweep-leaves-partial-saves", f"{CHECKPOINT}/durable.py")
    .replaces(
        "            shutil.rmtree(partial, ignore_errors=True)\n", "            partial.exists()\n"
    )
    .caught_by(KILLED),
    Mutant("sweep-removes-moved-checkpoint", f"{CHECKPOINT}/durable.py")
    .replaces(
        "                    os.rename(aside, folder / moved)\n",
        "                    shutil.rmtree(aside)\n",
    )
    .caught_by(KILLED),
    Mutant("saves-of-others-swept", f"{CHECKPOINT}/durable.py")
    .replaces(
        "        return named[5] != str(os.getpid()) and start_of(int(named[5])) == named[6]\n",
        "        return False\n",
    )
    .caught_by(
        f"{UNIT}/test_durable.py::test_two_writers_of_one_folder_leave_each_others_checkpoints_alone"
    ),
    Mutant("name-missing-for-a-moment", f"{CHECKPOINT}/durable.py")
    .replaces("    elif not exchange(partial, path):\n", "    else:\n")
    .caught_by(f"{UNIT}/test_durable.py::test_the_name_of_a_replaced_checkpoint_is_never_missing"),
    Mutant("unshared-folder-accepted", f"{CHECKPOINT}/saving.py")
    .replaces("if not file.exists() or file", "if file.exists() and file")
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_a_folder_that_nodes_do_not_share_is_an_error_of_the_save"
    ),
    Mutant("experts-saved-as-replicas", f"{CHECKPOINT}/state.py")
    .replaces("[over_edp, Shard(0)]", "[over_edp, Replicate()]")
    .caught_by(LAYOUTS),
    Mutant("moments-saved-as-replicas", f"{CHECKPOINT}/state.py")
    .replaces(
        "    return isinstance(value, Tensor) and value.shape == p.shape\n", "    return False\n"
    )
    .caught_by(LAYOUTS),
    Mutant("random-state-forgotten", f"{CHECKPOINT}/state.py")
    .replaces('    torch.set_rng_state(states["host"])\n', '    assert "host" in states\n')
    .caught_by(
        f"{FAULTS}/test_resume.py::test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one[2-0]"
    ),
    Mutant("python-random-state-forgotten", f"{CHECKPOINT}/state.py")
    .replaces(
        "        random.setstate((3, tuple(words), gauss))\n",
        "        assert len(words) == 625 and (gauss is None or gauss)\n",
    )
    .caught_by(f"{UNIT}/test_checkpoint_state.py::test_restored_generators_draw_the_same_numbers"),
    Mutant("split-experts-saved-as-whole", f"{CHECKPOINT}/state.py")
    .replaces(
        "over_edp = Shard(1) if isinstance(experts, DTensor) else Replicate()",
        "over_edp = Replicate()",
    )
    .caught_by(
        f"{FAULTS}/test_sharded.py::test_a_checkpoint_of_any_layout_is_read_in_any_other[layouts0]"
    ),
    Mutant("damaged-directory-read", f"{CHECKPOINT}/loading.py")
    .replaces("    durable.verify(path)\n    meta = of_this_rank(", "    meta = of_this_rank(")
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_a_damaged_directory_is_refused_and_other_checkpoints_are_read_as_before"
    ),
    # -------------------------------------------------- when is saved, and what a save touches
    Mutant("saved-between-accumulated-batches", f"{LIGHTNING}/seam/loops.py")
    .replaces(
        "    if not is_fitting(trainer) or stepped:\n",
        "    if not is_fitting(trainer) or not stepped:\n",
    )
    .caught_by(
        f"{FAULTS}/test_resume.py::test_a_checkpoint_that_is_requested_inside_a_step_is_saved_at_its_end"
    ),
    Mutant("saved-again-in-next-step", f"{LIGHTNING}/seam/saves.py")
    .replaces(
        "            callback._last_global_step_saved = trainer.global_step\n",
        "            assert callback._last_global_step_saved >= 0\n",
    )
    .caught_by(
        f"{FAULTS}/test_resume.py::test_a_run_does_not_change_the_checkpoint_that_it_resumes_from"
    ),
    Mutant("save-inside-a-step", f"{LIGHTNING}/trainer_checkpoints.py")
    .replaces(
        "if loops.accumulated_batches(module.trainer) and takes_steps:",
        "if loops.accumulated_batches(module.trainer) < 0:",
    )
    .caught_by(
        f"{FAULTS}/test_resume.py::test_a_checkpoint_that_is_requested_inside_a_step_is_saved_at_its_end"
    ),
    Mutant("save-after-fit-not-completed", f"{LIGHTNING}/trainer_checkpoints.py")
    .replaces("    if not takes_steps:  # else", "    if not path:  # else")
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_a_checkpoint_that_is_saved_after_fit_is_complete_at_once"
    ),
    Mutant("optimizers-read-for-a-test", f"{LIGHTNING}/strategy.py")
    .replaces("self.optimizers if loops.is_fitting(self.module.trainer) else []", "self.optimizers")
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_loading_changes_no_optimizer_of_fit_and_refuses_other_groups_and_hooks"
    ),
    Mutant("anything-removed", f"{LIGHTNING}/seam/saves.py")
    .replaces(
        'return path.name != ".." and (inside or of_tuner)',
        "return bool(path.name) or inside or of_tuner",
    )
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_nothing_outside_the_folders_of_checkpoints_is_removed"
    ),
    Mutant("one-rank-saves-after-exception", f"{LIGHTNING}/strategy.py")
    .replaces(
        "        return self.mesh.world_size > 1 and loops.was_interrupted(self.module.trainer)\n",
        "        return self.mesh.world_size < 1 and loops.was_interrupted(self.module.trainer)\n",
    )
    .caught_by(
        f"{FAULTS}/test_guards.py::test_callbacks_that_save_after_an_exception_wait_for_no_rank"
    ),
    Mutant("last-step-not-saved", f"{LIGHTNING}/seam/saves.py")
    .replaces(
        "        if self.save_top_k and self._last", "        if not self.save_top_k and self._last"
    )
    .caught_by(
        f"{FAULTS}/test_run_files.py::test_a_finished_run_has_the_checkpoint_of_its_summary"
    ),
    # ------------------------------------------------------------------ stopping
    Mutant("stop-requests-not-shared", f"{LIGHTNING}/job.py")
    .replaces(
        "(dist.all_reduce(sums, group=self.group, async_op=True), sums)",
        "(dist.all_reduce(sums.clone(), group=self.group, async_op=True), sums)",
    )
    .caught_by(f"{DIST}/test_poll.py"),
    Mutant("sigterm-ignored-during-validation", f"{LIGHTNING}/job.py")
    .replaces("            self.polls_left = int(fewest)\n", "            self.polls_left = 0\n")
    .caught_by(f"{FAULTS}/test_stop.py::test_sigterm_during_validation_stops_the_run_there[1]"),
    Mutant("best-checkpoint-lost-after-stop", f"{LIGHTNING}/job.py")
    .replaces(
        "        self.has_begun = False\n        self.ask",
        "        saves.mark_step_as_saved(self.module.trainer)\n        self.ask",
    )
    .caught_by(f"{FAULTS}/test_stop.py::test_a_stop_during_validation_loses_no_best_checkpoint[4]"),
    Mutant("no-poll-after-last-step", f"{LIGHTNING}/job.py")
    .replaces(
        "            self.ask_and_wait()  # so that", "            assert self.stop  # so that"
    )
    .caught_by(
        f"{FAULTS}/test_stop_any_time.py::"
        "test_sigterm_before_the_first_step_or_after_the_last_is_not_lost[after the last step]"
    ),
    Mutant("ctrl-c-not-handled", f"{LIGHTNING}/stop.py")
    .replaces("(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)", "(signal.SIGTERM, signal.SIGHUP)")
    .caught_by(f"{FAULTS}/test_stop.py::test_ctrl_c_stops_the_run_as_sigterm_does"),
    Mutant("ctrl-c-left-to-lightning", f"{LIGHTNING}/seam/launch.py")
    .replaces("        if number not in numbers:\n", "        if number not in numbers[:1]:\n")
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_after_a_run_ctrl_c_and_sigterm_do_what_they_did_before"
    ),
    Mutant("ranks-poll-unequal-times", f"{LIGHTNING}/job.py")
    .replaces("self.poll.smallest(sum(batches))", "sum(batches)")
    .caught_by(
        f"{FAULTS}/test_stop.py::test_ranks_with_different_numbers_of_validation_batches_agree_too"
    ),
    Mutant("uneven-batches-accepted", f"{LIGHTNING}/job.py")
    .replaces("    if mesh.world_size == 1:\n", "    if mesh.world_size > 1:\n")
    .caught_by(f"{FAULTS}/test_batches.py::test_each_loader_is_counted"),
    # -------------------------------------------------- ranks that fail, wait or differ
    Mutant("roll-call-omits-missing-ranks", f"{LIGHTNING}/roll_call.py")
    .replaces(
        "        except RuntimeError:\n            absent.append(rank)\n    return",
        "        except RuntimeError:\n            pass\n    return",
    )
    .caught_by(f"{FAULTS}/test_guards.py::test_a_roll_call_names_the_missing_ranks"),
    Mutant("groups-ignore-timeout", f"{PARALLEL}/mesh.py")
    .replaces("ranks.tolist(), timeout=timeout, group_desc", "ranks.tolist(), group_desc")
    .caught_by(f"{FAULTS}/test_guards.py::test_no_group_waits_longer_than_the_timeout"),
    Mutant("timeout-of-the-start-stays", f"{LIGHTNING}/strategy.py")
    .replaces(
        "        set_default_timeout(self.timeout)\n",
        "        set_default_timeout(self.start_timeout)\n",
    )
    .caught_by(f"{FAULTS}/test_guards.py::test_no_group_waits_longer_than_the_timeout"),
    Mutant("long-work-in-one-collective", f"{CHECKPOINT}/together.py")
    .replaces("        thread.join(timeout=1)\n", "        thread.join()\n")
    .caught_by(
        f"{FAULTS}/test_checkpoint_content.py::test_no_rank_waits_in_one_collective_for_the_long_work_of_another"
    ),
    Mutant("early-experts-accepted", f"{PARALLEL}/mesh.py")
    .replaces("        if held != wanted:\n", "        if held is None:\n")
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_experts_that_the_strategy_cannot_shard_are_refused"
    ),
    Mutant("averaging-copies-accepted", f"{LIGHTNING}/guarded_update.py")
    .replaces("        if isinstance(callback, COPYING):\n", "        if callback is COPYING:\n")
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_callbacks_that_average_weights_in_a_copy_are_refused_by_name"
    ),
)
