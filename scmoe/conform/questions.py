"""The questions, a line each: what is played, and which kinds of tensors must be right.

The first five look at one forward and backward pass. What they have found wrong, the later ones do
not look at again, so a mistake is reported once: a question about unequal tokens fails for one
with unequal tokens alone.
"""

from typing import NamedTuple

PASS = ("output", "input gradient", "dense gradient", "router gradient", "expert gradient")
WEIGHT_GRADIENTS = PASS[2:]
OF_REPLICAS = ("dense gradient", "router gradient")


class Question(NamedTuple):
    """name, play: one of PLAYS. kinds: of tensors. exact: bits must be equal. follows: kinds whose
    mistake makes this wrong too, so that it is not asked."""

    name: str
    play: str
    kinds: tuple[str, ...] = PASS
    exact: bool = False
    follows: tuple[str, ...] = ()


FIRST_QUESTIONS = (
    Question("outputs", "whole", ("output",)),
    Question("input gradients", "whole", ("input gradient",)),
    Question("dense gradients", "whole", ("dense gradient",)),
    Question("router gradients", "whole", ("router gradient",)),
    Question("expert gradients", "whole", ("expert gradient",)),
)
OTHERS = (
    Question("gradient norm", "clipped", ("norm",), follows=OF_REPLICAS),
    Question("clipping", "clipped", ("clipped",)),
    Question("optimizer step", "stepped", ("stepped",)),
    Question("accumulation", "accumulated", WEIGHT_GRADIENTS),
    Question("frozen experts", "frozen"),
    Question("unequal tokens", "unequal"),
    Question("no tokens on a rank", "without rows"),
    Question("all tokens to one expert", "one expert"),
    Question("an expert without tokens", "idle expert"),
    Question("padding has no effect", "padded", (*PASS, "padding gradient")),
    Question("padding takes no capacity", "padded under capacity"),
    Question("padding takes no rows", "padded rows", ("rows",)),
    Question("non-contiguous input", "non-contiguous"),
    Question("recompute", "recomputed"),
    Question("the same twice", "twice", ("again",), exact=True),
    Question("balance loss", "after steps", ("balance",)),
    Question("router bias", "after steps", ("bias",), follows=OF_REPLICAS),
    Question("replicas after steps", "after steps", ("replica",), exact=True, follows=OF_REPLICAS),
    Question("a non-finite value on a rank", "non-finite", ("norm is finite",)),
    Question("LoRA on experts", "with LoRA"),
)
CHECKPOINT = "checkpoint on other ranks"
RAISES = "a rank that raises"
QUESTION_NAMES = [*(question.name for question in (*FIRST_QUESTIONS, *OTHERS)), CHECKPOINT, RAISES]
