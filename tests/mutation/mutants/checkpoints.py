"""These bugs damage checkpoints, or make a resumed run differ from an uninterrupted one."""

from __future__ import annotations

from tests.mutation.mutant import DATA, DIST, DP, FAULTS, KILLED, PARALLEL, UNIT, Mutant

MUTANTS = (
    # ------------------------------------------------------------------ checkpoints
    Mutant("commit-by-copying", 1, f"{PARALLEL}/checkpoint/durable.py")
    .replaces(
        "        os.rename(partial, path)\n    elif",
        "        shutil.copytree(partial, path)\n        shutil.rmtree(partial)\n    elif",
    )
    .caught_by(KILLED),
    Mutant("old-checkpoint-removed-first", 3, f"{PARALLEL}/checkpoint/durable.py")
    .replaces("        os.rename(path, old)  #", "        shutil.rmtree(path)  #")
    .caught_by(KILLED),
    Mutant("manifest-checks-only-sizes", 5, f"{PARALLEL}/checkpoint/durable.py")
    .replaces(" or fingerprint(path / name) == expected)", " or True)")
    .caught_by(f"{UNIT}/test_durable.py::test_any_flipped_bit_is_found"),
    Mutant("manifest-seal-not-checked", 5, f"{PARALLEL}/checkpoint/durable.py")
    .replaces(
        '        sealed = _seal({"step": manifest["step"], "files": manifest["files"]}).encode() == text\n',
        '        sealed = {"step", "files"} <= manifest.keys()\n',
    )
    .caught_by(f"{UNIT}/test_durable.py::test_any_flipped_bit_is_found"),
    Mutant("foreign-shards-accepted", 2, f"{PARALLEL}/checkpoint/durable.py")
    .replaces('sorted(present ^ manifest["files"].keys())', 'sorted(manifest["files"].keys() - present)')
    .caught_by(f"{UNIT}/test_durable.py::test_a_shard_of_another_save_is_refused"),
    Mutant("sweep-leaves-partial-saves", 6, f"{PARALLEL}/checkpoint/durable.py")
    .replaces("            shutil.rmtree(partial, ignore_errors=True)\n", "            partial.exists()\n")
    .caught_by(KILLED),
    Mutant("sweep-removes-moved-checkpoint", 1, f"{PARALLEL}/checkpoint/durable.py")
    .replaces("                    os.rename(aside, folder / moved)\n", "                    shutil.rmtree(aside)\n")
    .caught_by(KILLED),
    Mutant("sweep-removes-similar-names", 6, f"{PARALLEL}/checkpoint/durable.py")
    .replaces('-([0-9a-f]{8}(?:-([0-9a-f]{8})-(\\d+)-(\\d+))?)")', '-(.*(?:-(x)-(x)-(x))?)")')
    .caught_by(f"{UNIT}/test_durable.py::test_sweeping_leaves_what_no_writer_has_named"),
    Mutant("every-checkpoint-read-fully", 5, f"{PARALLEL}/checkpoint/durable.py")
    .replaces('found.append((read_manifest(path)["step"],', "found.append((verify(path),")
    .caught_by(f"{UNIT}/test_durable.py::test_only_the_newest_whole_checkpoint_is_read"),
    Mutant("rank-0-hashes-all-shards", 7, f"{PARALLEL}/checkpoint/saving.py")
    .replaces(
        "        files[META] = durable.fingerprint(self.partial / META)\n",
        "        files = {file.name: durable.fingerprint(file) for file in self.partial.iterdir()}\n",
    )
    .caught_by(
        f"{FAULTS}/test_checkpoint_content.py::test_fault_07_each_rank_hashes_its_own_shard_where_it_writes_it[True]"
    ),
    Mutant("experts-saved-as-replicas", 10, f"{PARALLEL}/checkpoint/state.py")
    .replaces("[over_edp, Shard(0)]", "[over_edp, Replicate()]")
    .caught_by(DP),
    Mutant("moments-saved-as-replicas", 9, f"{PARALLEL}/checkpoint/state.py")
    .replaces("    return isinstance(value, Tensor) and value.shape == p.shape\n", "    return False\n")
    .caught_by(DP),
    # ------------------------------------------------------------------ resuming
    Mutant("data-position-forgotten", 8, f"{DATA}/positioned.py")
    .replaces('        self.consumed_samples = state_dict["consumed_samples"]\n', "        self.consumed_samples = 0\n")
    .caught_by(f"{UNIT}/test_text.py::test_resume_is_exact_with_another_world_size[0]"),
    Mutant("random-state-forgotten", 8, f"{PARALLEL}/checkpoint/state.py")
    .replaces('    torch.set_rng_state(states["host"])\n', '    assert "host" in states\n')
    .caught_by(
        f"{DIST}/test_strategy.py::test_a_run_resumed_in_the_same_layout_is_bit_identical_to_an_uninterrupted_one[2-null]"
    ),
    Mutant("validation-changes-dropout", 8, f"{DATA}/positioned.py")
    .replaces(
        "            generator=torch.Generator().manual_seed(self.seed + rank),\n",
        "            generator=None if rank >= 0 else torch.Generator(),\n",
    )
    .caught_by(f"{FAULTS}/test_resume.py::test_fault_08_validating_changes_no_dropout[0]"),
    Mutant("ranks-read-the-same-samples", 11, f"{DATA}/order.py")
    .replaces(
        "np.arange(first + self.rank, first + self.micro_batch, self.world)",
        "np.arange(first, first + self.micro_batch, self.world)",
    )
    .caught_by(f"{UNIT}/test_text.py::test_every_world_size_sees_the_same_global_batches"),
    Mutant("last-validation-batch-dropped", 16, f"{DATA}/positioned.py")
    .replaces("-(-len(dataset) // self.micro_batch)", "len(dataset) // self.micro_batch")
    .caught_by(f"{UNIT}/test_text.py::test_validation_covers_every_target_once"),
    Mutant("python-random-state-forgotten", 8, f"{PARALLEL}/checkpoint/state.py")
    .replaces(
        "        random.setstate((3, tuple(words), gauss))\n",
        "        assert len(words) == 625 and (gauss is None or gauss)\n",
    )
    .caught_by(f"{UNIT}/test_random_state.py::test_restored_generators_draw_the_same_numbers"),
    Mutant("saved-between-accumulated-batches", 8, "scmoe/lightning/seam.py")
    .replaces("    if not is_fitting(trainer) or stepped:\n", "    if not is_fitting(trainer) or not stepped:\n")
    .caught_by(
        f"{FAULTS}/test_resume.py::test_fault_08_a_checkpoint_that_is_requested_inside_a_step_is_saved_at_its_end"
    ),
    Mutant("saved-again-in-next-step", 8, "scmoe/lightning/seam.py")
    .replaces(
        "            callback._last_global_step_saved = trainer.global_step\n",
        "            assert callback._last_global_step_saved >= 0\n",
    )
    .caught_by(f"{FAULTS}/test_resume.py::test_fault_08_a_run_does_not_change_the_checkpoint_that_it_resumes_from"),
    Mutant("full-file-lacks-moments", 9, f"{PARALLEL}/checkpoint/saving.py")
    .replaces(
        "    write_whole(read_whole(folder), folder / FULL)\n",
        '    write_whole(read_whole(folder, "model."), folder / FULL)\n',
    )
    .caught_by(f"{FAULTS}/test_checkpoint_content.py::test_fault_09_one_full_file_is_read_at_any_ep_degree[False]"),
    Mutant("saves-of-others-swept", 0, "scmoe/parallel/checkpoint/durable.py")
    .replaces(
        "        return named[5] != str(os.getpid()) and start_of(int(named[5])) == named[6]\n",
        "        return False\n",
    )
    .caught_by("tests/unit/test_durable.py::test_two_writers_of_one_folder_leave_each_others_checkpoints_alone"),
    Mutant("name-missing-for-a-moment", 0, "scmoe/parallel/checkpoint/durable.py")
    .replaces("    elif not exchange(partial, path):\n", "    else:\n")
    .caught_by("tests/unit/test_durable.py::test_the_name_of_a_replaced_checkpoint_is_never_missing"),
    Mutant("umask-ignored", 0, "scmoe/parallel/checkpoint/durable.py")
    .replaces("        partial.chmod(mode)\n", "        partial.chmod(0o644)\n")
    .caught_by("tests/unit/test_durable.py::test_a_replaced_file_has_the_rights_that_the_umask_leaves"),
    Mutant("every-rank-reads-all-files", 0, "scmoe/parallel/checkpoint/durable.py")
    .replaces('sorted(manifest["files"])[share]', 'sorted(manifest["files"])')
    .caught_by("tests/unit/test_durable.py::test_a_share_of_the_files_is_read_and_all_sizes_are_compared"),
    Mutant("tuples-as-keys-unreadable", 0, "scmoe/parallel/checkpoint/state.py")
    .replaces("[[_key_to_json(k), to_json(v)]", "[[to_json(k), to_json(v)]")
    .caught_by("tests/unit/test_checkpoint_state.py::test_any_dictionary_is_read_back"),
    Mutant("hyper-parameters-not-checked", 0, "scmoe/parallel/checkpoint/state.py")
    .replaces("] = holder.hparams\n", "] = {}\n")
    .caught_by(
        "tests/unit/test_checkpoint_state.py::test_hyper_parameters_and_callbacks_that_cannot_be_saved_are_refused_by_name"
    ),
    Mutant("save-after-fit-not-completed", 0, "scmoe/lightning/strategy.py")
    .replaces("        if not self.takes_steps:  # else", "        if self.is_alone:  # else")
    .caught_by(
        "tests/faults/test_lightning_users.py::test_56_a_checkpoint_that_is_saved_after_fit_is_complete_at_once"
    ),
    Mutant("optimizers-read-for-a-test", 0, "scmoe/lightning/strategy.py")
    .replaces("self.optimizers if seam.is_fitting(self.module.trainer) else []", "self.optimizers")
    .caught_by(
        "tests/faults/test_lightning_users.py::test_56_prediction_with_a_checkpoint_leaves_the_optimizers_of_fit_alone"
    ),
    Mutant("save-inside-a-step", 0, "scmoe/lightning/strategy.py")
    .replaces(
        "if seam.accumulated_batches(self.module.trainer) and self.takes_steps:",
        "if seam.accumulated_batches(self.module.trainer) < 0:",
    )
    .caught_by(
        "tests/faults/test_resume.py::test_fault_08_a_checkpoint_that_is_requested_inside_a_step_is_saved_at_its_end"
    ),
    Mutant("anything-removed", 0, "scmoe/lightning/strategy.py")
    .replaces('return path.name != ".." and (inside or of_tuner)', "return bool(path.name) or inside or of_tuner")
    .caught_by("tests/faults/test_lightning_users.py::test_56_nothing_outside_the_folders_of_checkpoints_is_removed"),
    Mutant("all-ranks-verify-all", 0, "scmoe/parallel/checkpoint/loading.py")
    .replaces("slice(context.rank, None, context.world_size)", "slice(None)")
    .caught_by(
        "tests/faults/test_checkpoint_content.py::test_fault_07_each_rank_hashes_its_own_shard_where_it_writes_it"
    ),
    Mutant("long-work-in-one-collective", 0, "scmoe/parallel/mesh.py")
    .replaces("            thread.join(timeout=1)\n", "            thread.join()\n")
    .caught_by(
        "tests/faults/test_checkpoint_content.py::test_fault_07_no_rank_waits_in_one_collective_for_the_long_work_of_another"
    ),
    Mutant("unshared-folder-accepted", 0, "scmoe/parallel/checkpoint/saving.py")
    .replaces("if not file.exists() or file", "if file.exists() and file")
    .caught_by(
        "tests/faults/test_lightning_users.py::test_04_a_folder_that_nodes_do_not_share_is_an_error_of_the_save"
    ),
)
