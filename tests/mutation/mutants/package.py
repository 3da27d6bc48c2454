"""These bugs are in what a user meets: names of configurations, extras, the drop-in block, the documentation's site."""

from __future__ import annotations

from tests.mutation.mutant import DIST, FAULTS, PARALLEL, UNIT, Mutant

SITE, HOOKS = f"{UNIT}/test_docs_site.py", "docs/hooks"
DROP_IN, SHIPPED = f"{DIST}/test_drop_in.py", f"{UNIT}/test_shipped.py"
COMMANDS = f"{UNIT}/test_commands.py"
MUTANTS = (
    Mutant("shipped-config-hides-the-users", 0, "scmoe/config/load.py")
    .replaces(
        'folder / name, folder / "configs" / name, SHIPPED / name.removeprefix("configs/")',
        'SHIPPED / name.removeprefix("configs/"), folder / name, folder / "configs" / name',
    )
    .caught_by(f"{SHIPPED}::test_the_current_folder_comes_first"),
    Mutant("extends-knows-no-names", 0, "scmoe/config/load.py")
    .replaces("find(parent, path.parent)", "path.parent / parent")
    .caught_by(f"{SHIPPED}::test_a_file_may_extend_a_shipped_one_by_name"),
    Mutant("own-bug-taken-for-a-missing-package", 0, "experiments/engine/command_line.py")
    .replaces("        if lacks is None:\n            raise\n", "")
    .caught_by(f"{UNIT}/test_extras.py"),
    Mutant("verb-imports-torch-before-parsing", 0, "experiments/evaluate.py")
    .replaces("import json\n", "import json\n\nimport torch as torch\n")
    .caught_by(f"{COMMANDS}::test_every_verb_shows_its_help_and_refuses_a_wrong_option_without_torch"),
    Mutant("half-a-command-succeeds", 0, "experiments/engine/command_line.py")
    .replaces('if act.__name__ == "help_print" and words and', "if act is None and")
    .caught_by(f"{COMMANDS}::test_what_no_verb_can_mean_is_refused_in_one_line"),
    Mutant("hyphens-are-options", 0, "experiments/engine/command_line.py")
    .replaces("allow_leading_hyphen=True", "allow_leading_hyphen=False")
    .caught_by(f"{COMMANDS}::test_overrides_and_options_may_be_mixed"),
    Mutant("scmoe-is-thought-to-be-on-path", 0, "scmoe/config/extras.py")
    .replaces("if not beside.exists() or", "if beside.exists() or")
    .caught_by(f"{COMMANDS}::test_the_next_command_is_named_as_it_works_here"),
    Mutant("interrupted-job-begins-again", 0, "experiments/studies/jobs.py")
    .replaces('re.sub(r"\\btrain(\\.py)?$", r"resume\\1", program)', "program")
    .caught_by(f"{UNIT}/test_table_make.py"),
    Mutant("drop-in-experts-not-averaged", 0, "scmoe/parallel/update/wrap.py")
    .replaces("([*shards.values()], context, pacer)", "([], context, pacer)")
    .caught_by(f"{DROP_IN}::test_two_ranks_give_the_outputs_and_gradients_of_one"),
    Mutant("drop-in-balance-of-one-rank", 0, "scmoe/api.py")
    .replaces(
        "        dist.all_reduce(sums_LE2, group=None if group is context else group)\n",
        "        sums_LE2 = sums_LE2 * 2\n",
    )
    .caught_by(f"{DROP_IN}::test_two_ranks_give_the_outputs_and_gradients_of_one"),
    Mutant("tied-weights-lost-in-one-process", 56, f"{PARALLEL}/checkpoint/loading.py")
    .replaces('meta.pop("tied_weights", {}).items()', "{}.items()")
    .caught_by(
        f"{FAULTS}/test_lightning_users.py::test_56_load_from_checkpoint_reads_a_directory_of_any_number_of_ranks"
    ),
    Mutant("field-missing-on-its-page", 0, f"{HOOKS}/config_reference.py")
    .replaces("map(row, fields)", "map(row, [*fields][1:])")
    .caught_by(f"{SITE}::test_the_page_of_fields_has_each_field_once_with_its_default_and_range"),
    Mutant("link-leaves-the-site", 0, f"{HOOKS}/pages.py")
    .replaces('MOVED.get(path, f"source/{path}.md")', "MOVED.get(path, path)")
    .caught_by(f"{SITE}::test_links_lead_to_pages_of_the_site"),
    Mutant("new-page-not-in-the-navigation", 0, f"{HOOKS}/pages.py")
    .replaces('[*whole, {"Further pages": rest}] if rest else whole', "whole")
    .caught_by(f"{SITE}::test_every_page_is_in_the_navigation"),
    Mutant("site-loads-from-the-network", 0, f"{HOOKS}/pages.py")
    .replaces("    if loaded:\n", "    if len(loaded) > 9:\n")
    .caught_by(f"{SITE}::test_a_page_that_loads_from_the_network_is_refused"),
)
