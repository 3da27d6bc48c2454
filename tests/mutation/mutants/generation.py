"""These bugs are in generation: the cache, sampling, where texts end, and ranks in lockstep."""

from __future__ import annotations

from tests.mutation.mutant import DIST, FAULTS, UNIT, Mutant

BLOCKS, INFERENCE, TEST = "scmoe/blocks", "scmoe/inference", f"{UNIT}/test_generate.py"
PARALLEL, PLANNED = "scmoe/parallel", f"{DIST}/test_inference_planner.py"
ALONE = f"{TEST}::test_tokens_are_those_without_a_cache_and_of_each_text_alone"
LOCKSTEP = f"{DIST}/test_generation.py::test_ranks_go_on_until_the_last_text_has_ended"
PARTS = f"{DIST}/test_generation.py::test_texts_do_not_depend_on_ranks_or_on_where_weights_are"

MUTANTS = (
    Mutant("cached-keys-not-masked", 0, f"{BLOCKS}/kv_cache.py")
    .replaces("<= self.positions_BS[:, None, :, None]", "<= self.capacity + self.positions_BS[:, None, :, None]")
    .caught_by(f"{ALONE}[gpt-pos2]"),
    Mutant("padding-overwrites-keys", 0, f"{BLOCKS}/kv_cache.py")
    .replaces("places_BS.where(mask_BS, self.capacity)", "places_BS.where(mask_BS, 0)")
    .caught_by(f"{TEST}::test_padding_leaves_no_trace_in_the_cache"),
    Mutant("a-piece-does-not-see-earlier-ones", 0, f"{BLOCKS}/kv_cache.py")
    .replaces("self.longest == 0, int(", "mask_BS.shape[1] > 1, int(")
    .caught_by(f"{TEST}::test_a_prompt_in_pieces_equals_one_piece[3-gpt]"),
    Mutant("cached-keys-rotated-from-zero", 0, f"{BLOCKS}/sublayers.py")
    .replaces("None if cache is None else cache.positions_BS[:, None]", "None")
    .caught_by(f"{ALONE}[llama-pos2]"),
    Mutant("generation-drops-tokens", 0, "scmoe/moe/stream.py")
    .replaces("stream.sums = None, buffer, True, False", "stream.sums = stream.capacity_factor, buffer, True, False")
    .caught_by(f"{ALONE}[gpt-pos2]"),
    Mutant("prefill-reads-the-padding", 0, f"{INFERENCE}/passes.py")
    .replaces("(mask_BS.sum(1) - 1).clamp(min=0)", "torch.full((len(ids_BS),), ids_BS.shape[1] - 1)")
    .caught_by(f"{ALONE}[gpt-pos2]"),
    Mutant("one-generator-for-a-batch", 0, f"{INFERENCE}/sampling.py")
    .replaces("generator=generator) for generator in generators", "generator=generators[0]) for _ in generators")
    .caught_by(f"{TEST}::test_a_sampled_text_equals_itself_alone"),
    Mutant("a-stop-string-is-shown", 0, f"{INFERENCE}/stopping.py")
    .replaces("text[: len(text) - max(", "text[: len(text) - min(")
    .caught_by(f"{TEST}::test_what_is_shown_of_a_text_never_changes_later"),
    Mutant("a-rank-stops-before-the-others", 61, f"{INFERENCE}/generate.py")
    .replaces("        ended = passes.all_ranks(not any(going))\n", "        ended = not any(going)\n")
    .caught_by(LOCKSTEP),
    Mutant("a-rank-reads-the-first-experts", 0, "scmoe/parallel/checkpoint/export.py")
    .replaces("get_slice(name)[ids.start : ids.stop]", "get_slice(name)[: len(ids)]")
    .caught_by(PARTS),
    Mutant("generation-fails-alone", 61, "scmoe/runs/on_ranks.py")
    .replaces(
        "BaseException as error:\n        trainer.strategy.on_exception(error)\n",
        "BaseException as error:\n        assert error\n",
    )
    .caught_by(f"{FAULTS}/test_generation.py::test_61_a_rank_that_dies_while_texts_are_generated_ends_all"),
    Mutant("a-long-prompt-starts-ranks", 63, "scmoe/runs/continuation.py")
    .replaces("        encoded(request, data.tokenizer, config)  # so", "        # so")
    .caught_by(f"{FAULTS}/test_generation.py::test_63_a_request_that_cannot_be_met_starts_no_rank"),
    Mutant("a-text-takes-the-last-piece's-logits", 0, f"{INFERENCE}/passes.py")
    .replaces("after_BV.where(own_BS.any(1, keepdim=True), logits_BV)", "after_BV")
    .caught_by(f"{TEST}::test_a_prompt_in_pieces_equals_one_piece[3-gpt]"),
    Mutant("a-rank-stops-reading-first", 61, f"{INFERENCE}/passes.py")
    .replaces("not passes.all_ranks(start >= longest)", "start < longest")
    .caught_by(PARTS),
    Mutant("ranks-plan-by-their-own-times", 0, "scmoe/planning/inference_planner.py")
    .replaces("group).amax(0)", "group)[dist.get_rank(group)]")
    .caught_by(f"{PLANNED}::test_overlap_is_planned_where_it_makes_a_pass_faster"),
    Mutant("overlap-is-planned-for-no-gain", 0, "scmoe/planning/inference_planner.py")
    .replaces("(1 - LEAST_GAIN) * seconds", "seconds")
    .caught_by(f"{PLANNED}::test_overlap_that_gains_too_little_is_planned_sequential"),
)
