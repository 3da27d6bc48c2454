"""These bugs are in what a user adds without editing: extensions, who may import them, and the optimizer Muon."""

from __future__ import annotations

from tests.mutation.mutant import DIST, FAULTS, UNIT, Mutant

KEPT = f"{FAULTS}/test_extensions.py::test_69_what_a_run_keeps_is_not_imported_and_its_callbacks_do_not_run"
MUTANTS = (
    Mutant("kept-extensions-imported", 69, "scmoe/config/load.py")
    .replaces("    if not named(overrides):\n        refuse_kept(tree.extensions, source)\n", "")
    .caught_by(KEPT),
    Mutant("kept-callbacks-read", 69, "scmoe/config/load.py")
    .replaces('    OmegaConf.update(tree, "callbacks", {}, merge=False)\n    if', "    if")
    .caught_by(KEPT),
    Mutant("kept-callbacks-forgotten-in-silence", 69, "scmoe/training/run/resume.py")
    .replaces("    refuse_kept_callbacks(text, source, overrides)\n", "")
    .caught_by(KEPT),
    Mutant("config-beside-an-export-trusted", 69, "scmoe/runs/on_ranks.py")
    .replaces("partial(load_kept, run.parent", "partial(__import__('scmoe').load_config, run.parent")
    .caught_by(KEPT),
    Mutant("name-registered-twice", 70, "scmoe/config/registry.py")
    .replaces("            if name in self.makers:\n", "            if not name:\n")
    .caught_by(f"{FAULTS}/test_extensions.py::test_70_an_extension_that_cannot_be_used_gives_one_line"),
    Mutant("extension-s-error-in-many-lines", 70, "scmoe/config/registry.py")
    .replaces("        except Exception as error:", "        except ImportError as error:")
    .caught_by(f"{FAULTS}/test_extensions.py::test_70_an_extension_that_cannot_be_used_gives_one_line"),
    Mutant("spawned-rank-knows-no-extension", 0, "scmoe/training/assembly/model.py")
    .replaces("    import_extensions(config.extensions)  # a spawned rank has not read the configuration\n", "")
    .caught_by(f"{DIST}/test_extensions.py::test_a_spawned_rank_imports_the_extension"),
    Mutant("experts-orthogonalised-together", 0, "scmoe/training/muon.py")
    .replaces("(t.unbind() if t.dim() > 2 else (t,))", "(t.flatten(0, -2),)")
    .caught_by(f"{UNIT}/test_optimizers.py::test_each_expert_is_updated_as_torchs_muon_updates_a_single_matrix"),
    Mutant("muon-estimated-as-adamw", 0, "scmoe/training/assembly/model.py")
    .replaces("return module.trained().matrices", "return module.trained().matrices[:0]")
    .caught_by(f"{UNIT}/test_memory.py::test_state_has_exactly_the_bytes_of_a_real_rank"),
    Mutant("stopped-run-forgets-its-extensions", 0, "scmoe/training/run/train.py")
    .replaces(", *words(config.extensions, config.callbacks))", ", *words([], {}))")
    .caught_by(KEPT),
    Mutant("muon-scaled-by-orientation", 0, "scmoe/training/muon.py")
    .replaces('adjust_lr_fn="match_rms_adamw"', 'adjust_lr_fn="original"')
    .caught_by(f"{UNIT}/test_optimizers.py::test_each_expert_is_updated_as_torchs_muon_updates_a_single_matrix"),
)
