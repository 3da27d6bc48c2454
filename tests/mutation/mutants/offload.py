"""These bugs are in the store of experts, in its cache, and in how experts migrate."""

from __future__ import annotations

from tests.mutation.mutant import FAULTS, UNIT, Mutant

OFFLOAD, LAWS, BROKEN = "scmoe/inference/offload", f"{UNIT}/test_offload.py", f"{FAULTS}/test_offload.py"
SLOTS = f"{LAWS}::test_the_cache_never_exceeds_its_slots_and_returns_the_right_expert"
BITS = f"{LAWS}::test_every_way_gives_the_bits_of_resident_experts[scmoe-2]"
MUTANTS = (
    # ------------------------------------------------------------------ the store
    Mutant("store-content-not-compared", 65, f"{OFFLOAD}/store.py")
    .replaces("8 + length) != content:", "8 + length) == b'':")
    .caught_by(f"{BROKEN}::test_64_any_flipped_bit_is_found"),
    Mutant("store-of-another-training", 65, f"{OFFLOAD}/store.py")
    .replaces("if owner != digest_of_rest(model):", "if not owner:")
    .caught_by(f"{BROKEN}::test_64_a_store_that_is_missing_cut_changed_or_another_models_is_named"),
    Mutant("partial-store-left", 68, f"{OFFLOAD}/store.py")
    .replaces("    finally:\n        partial.unlink(missing_ok=True)", "    except OSError:\n        partial.unlink()")
    .caught_by(f"{BROKEN}::test_67_ctrl_c_while_a_store_is_written_leaves_the_old_one"),
    # ------------------------------------------------------------------ the cache
    Mutant("expert-not-waited-for", 0, f"{OFFLOAD}/cache.py")
    .replaces("            fetch.wait()\n", "            assert fetch\n")
    .caught_by(SLOTS),
    Mutant("more-experts-than-slots", 0, f"{OFFLOAD}/cache.py")
    .replaces("self.free.append(self.held.pop(oldest).slot)", "self.free.append(self.held[oldest].slot.clone())")
    .caught_by(SLOTS),
    Mutant("needed-expert-goes", 0, f"{OFFLOAD}/cache.py")
    .replaces("if other not in wanted)", "if other != key)")
    .caught_by(SLOTS),
    Mutant("oldest-instead-of-least-recently-used", 0, f"{OFFLOAD}/cache.py")
    .replaces("                self.held.move_to_end(key)\n", "")
    .caught_by(f"{LAWS}::test_the_least_recently_used_expert_goes"),
    Mutant("failed-fetch-goes-unnoticed", 67, f"{OFFLOAD}/cache.py")
    .replaces("        self.future.result()\n", "        self.future.exception()\n")
    .caught_by(f"{BROKEN}::test_66_a_fetch_that_fails_ends_the_generation_with_the_experts_name[blocking]"),
    Mutant("thread-left-after-a-failed-fetch", 67, f"{OFFLOAD}/cache.py")
    .replaces("            self.close()\n            layer, e = key\n", "            layer, e = key\n")
    .caught_by(f"{BROKEN}::test_66_a_fetch_that_fails_ends_the_generation_with_the_experts_name[blocking]"),
    Mutant("reader-deaf-to-close", 68, f"{OFFLOAD}/cache.py")
    .replaces("        self.stop.set()\n", "")
    .caught_by(f"{BROKEN}::test_67_ctrl_c_leaves_no_thread_and_no_file"),
    Mutant("too-few-slots-accepted", 66, f"{OFFLOAD}/migration.py")
    .replaces("if not top_k + guesses <= slots <=", "if not 1 <= slots <=")
    .caught_by(f"{BROKEN}::test_65_slots_that_are_too_few_or_too_many_are_refused_with_what_is_needed"),
    # ------------------------------------------------------------------ migration
    Mutant("wrong-guess-used", 0, f"{OFFLOAD}/migration.py")
    .replaces(
        "        needed = self.cache.in_turn(self.layer, counts.counts_from_e[0].tolist())\n",
        "        needed = [key for key in self.cache.held if key[0] == self.layer] or self.cache.in_turn(\n"
        "            self.layer, counts.counts_from_e[0].tolist()\n        )\n",
    )
    .caught_by(f"{LAWS}::test_a_wrong_guess_is_never_used_and_a_right_one_is_a_hit[False]"),
    Mutant("expert-computes-anothers-rows", 0, f"{OFFLOAD}/migration.py")
    .replaces("            _, e = left.pop(0)\n", "            _, e = left.pop()\n")
    .caught_by(BITS),
    Mutant("blocking-fetches-ahead", 0, f"{OFFLOAD}/migration.py")
    .replaces('1 if way == "blocking" else slots, device', "slots, device")
    .caught_by(f"{LAWS}::test_fetching_begins_at_the_gate_and_only_blocking_waits_there[blocking]"),
    Mutant("determinate-fetch-waits-at-the-gate", 0, f"{OFFLOAD}/migration.py")
    .replaces('Blocking(fetching) if way == "blocking" else fetching', "Blocking(fetching)")
    .caught_by(f"{LAWS}::test_fetching_begins_at_the_gate_and_only_blocking_waits_there[determinate]"),
    Mutant("all-experts-read-with-the-rest", 0, "scmoe/runs/trained.py")
    .replaces("if not name.startswith(of_experts)}", "if name.startswith(of_experts) or name}")
    .caught_by(f"{LAWS}::test_a_model_is_built_without_its_experts_in_memory"),
)
