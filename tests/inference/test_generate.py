"""Generation with a cache equals generation without one, token for token, and each text equals
itself alone."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scmoe.blocks.kv_cache import KVCache, Visible
from scmoe.blocks.latent import LatentAttention
from scmoe.blocks.sublayers import attend, attend_by_group
from scmoe.inference.generate import (
    NewTokens,
    Passes,
    decode,
    generate,
    prefill,
    read_prompts,
    stream,
)
from scmoe.inference.sampling import GREEDY, Sampling, Stopping, choose
from scmoe.moe.layout import Buffers
from scmoe.moe.stream import MoEStream, dropless
from scmoe.runs.generate import shown
from tests.support.architectures import (
    BETWEEN_BLOCKS,
    EVERY_BLOCK,
    LATENT,
    LATENT_ATTENTION,
    SLOW,
    TABLES,
    overrides,
)
from tests.support.models import assert_close, tiny, tiny_model

pytestmark = pytest.mark.inference

CONTEXT, NEW = 32, 12
ARCHITECTURES = {"dense": "architecture=dense", **TABLES, **EVERY_BLOCK, **BETWEEN_BLOCKS}
FAMILIES = {
    "gpt": (),
    "llama": ("model.family=llama", "model.kv_heads=1"),
    "latent": ("model.family=llama",),
}
CASES = [("gpt", name) for name in ARCHITECTURES]
ARCHITECTURES |= LATENT_ATTENTION
INSIDE = {
    name: f"{ARCHITECTURES[name]} schedule.inside_attention=true" for name in ("pos3", "instella")
}
ARCHITECTURES |= {f"{name} inside attention": text for name, text in INSIDE.items()}
CASES += [("latent", name) for name in (*LATENT_ATTENTION, "instella inside attention")]
CASES += [("gpt", "pos3 inside attention")]
CASES += [("llama", name) for name in ("dense", "shared-cg1", "pos2", "dgmoe-share")]
CASES = [pytest.param(*case, marks=pytest.mark.faults if case[1] in SLOW else ()) for case in CASES]
PROMPTS = [
    [5, 9, 3],
    [7],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    [60, 61, 62, 63, 2],
]  # 3, 1, 11 and 5 tokens


def model_of(
    words: str = "", family: str = "gpt", dtype: torch.dtype = torch.float64, seed: int = 0
):
    """Return a model whose capacity would drop tokens, and whose greedy texts vary."""
    config = tiny(
        f"data.seq_len={CONTEXT}", "moe.capacity_factor=0.5", *FAMILIES[family], *overrides(words)
    )
    return tiny_model(config, dtype, seed).eval()


@torch.inference_mode()
def last_logits(model, ids: list[int]) -> torch.Tensor:
    """Return the logits of the next token, from a pass without a cache."""
    with dropless(model):
        return model(torch.tensor([ids])).logits_BSV[0, -1]


@torch.inference_mode()
def uncached(model, prompt: list[int], written: list[int]) -> list[int]:
    """Return the likeliest token after the prompt and after each that was written, from one pass
    without a cache."""
    with dropless(model):
        logits_BSV = model(torch.tensor([[*prompt, *written[:-1]]])).logits_BSV
    return logits_BSV[0, len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_tokens_are_those_without_a_cache_and_of_each_text_alone(family, name):
    model = model_of(ARCHITECTURES[name], family)
    for dtype in (torch.float64, torch.float32) if name == "pos2" else (torch.float64,):
        written = [ids for ids, _ in generate(model.to(dtype), PROMPTS, Stopping(NEW), GREEDY)]
        assert [len(ids) for ids in written] == [NEW] * len(PROMPTS)
        assert written == [uncached(model, *text) for text in zip(PROMPTS, written, strict=True)]
    assert len({token for ids in written for token in ids}) > 5, (
        "the texts are too simple to see a fault"
    )


def test_a_sampled_text_equals_itself_alone():
    model, sampling, seeds = model_of(), Sampling(0.9, 20, 0.95, 1.2), [3, 4, 5, 6]
    together = generate(model, PROMPTS, Stopping(NEW), sampling, seeds)
    alone = [
        generate(model, [p], Stopping(NEW), sampling, [s])[0]
        for p, s in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone
    assert generate(model, PROMPTS, Stopping(NEW), sampling, [4, 4, 5, 6])[0] != together[0], (
        "the seed counts"
    )


@pytest.mark.parametrize(("family", "piece"), [("gpt", 1), ("llama", 3), ("gpt", 4), ("latent", 3)])
def test_a_prompt_in_pieces_equals_one_piece(family, piece):
    """Logits differ by rounding, since products of other sizes add up in another order."""
    model, (prompt, other) = (
        model_of(f"top_k=2 {LATENT if family == 'latent' else ''}", family),
        PROMPTS[2:],
    )
    ids_BS = torch.tensor([prompt, other + [0] * (len(prompt) - len(other))])
    mask_BS = torch.arange(len(prompt)) < torch.tensor([[len(prompt)], [len(other)]])
    with dropless(model):
        whole, pieces = KVCache(2, CONTEXT), KVCache(2, CONTEXT)
        expected = prefill(model, ids_BS, mask_BS, whole)
        assert_close(read_prompts(model, ids_BS, mask_BS, pieces, Passes(piece=piece)), expected)
        step = torch.tensor([3, 4]), [True, True]
        assert_close(decode(model, *step, pieces), decode(model, *step, whole))


def test_padding_leaves_no_trace_in_the_cache():
    """A text that has ended brings padding to each pass: its length stays, and so do the others'
    logits."""
    model, cache = model_of(), KVCache(2, 6)
    with dropless(model):
        prefill(
            model, torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.bool), cache
        )
        for token in (7, 8, 9):
            logits_BV = decode(model, torch.tensor([0, token]), [False, True], cache)
        assert cache.lengths == [3, 6]
        assert_close(logits_BV[1], last_logits(model, [4, 5, 6, 7, 8, 9]))
        logits_BV = decode(model, torch.tensor([7, 0]), [True, False], cache)
        assert_close(logits_BV[0], last_logits(model, [1, 2, 3, 7]))
        with pytest.raises(
            ValueError, match="a text has 7 tokens, allowed: up to 6, the cache's capacity"
        ):
            decode(model, torch.tensor([7, 8]), [True, True], cache)


@pytest.mark.parametrize("new", (1, 3))
def test_on_a_gpu_a_mask_and_groups_of_heads_do_not_meet(new, monkeypatch):
    """Its fused kernels take one of the two. The result is the same up to the order of sums."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = draw(2, 6, new, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 8)
    mask = torch.arange(7) <= torch.tensor([[5], [3]])[:, None, None]
    mask = mask.expand(2, 1, new, 7)
    assert_close(attend_by_group(q, k, v, mask), attend(q, k, v, Visible(mask_B1SL=mask)), 1e-12)
    used, real = [], torch.nn.functional.scaled_dot_product_attention

    def attention(*tensors, enable_gqa=False, **seen):
        used.append(enable_gqa)
        return real(*tensors, **seen, enable_gqa=enable_gqa)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with FakeTensorMode():
        *qkv, on_gpu = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (q, k, v, mask)]
        y = attend(*qkv, Visible(mask_B1SL=on_gpu))
    assert used == [False] and y.shape == q.shape


@pytest.mark.parametrize(
    ("family", "words", "sizes"), [("llama", "", (8, 8)), ("latent", LATENT, (8, 4))]
)
def test_the_cache_holds_one_head_of_keys_or_one_latent_and_one_key(family, words, sizes):
    # of 2 heads; latent attention's have 10 and 5 features
    model, cache = (model_of(words, family), KVCache(1, 5))
    prefill(model, torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool), cache)
    shapes = [[tuple(buffer.shape) for buffer in pair] for pair in cache.buffers.values()]
    assert shapes == [[(1, 1, 6, size) for size in sizes]] * 2


def test_an_adapter_of_latent_attention_acts_with_a_cache_too():
    """The weight is not read past what wraps the module: offloading and adapters work there."""
    model = model_of(LATENT, "latent")
    products = [module.kv_up for module in model.modules() if isinstance(module, LatentAttention)]

    def decoded() -> torch.Tensor:
        cache = KVCache(1, 6)
        with dropless(model), torch.no_grad():
            prefill(model, torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.bool), cache)
            return decode(model, torch.tensor([7]), [True], cache)[0]

    plain = decoded()
    for product in products:
        product.register_forward_hook(lambda module, inputs, output: None)
    assert torch.equal(decoded(), plain)
    for product in products:
        product.register_forward_hook(lambda module, inputs, output: output + 0.5 * output.flip(-1))
    assert (decoded() - plain).abs().max() > 1e-3
    assert_close(decoded(), last_logits(model, [4, 5, 6, 7]))


def test_a_model_is_unchanged_between_the_passes_of_two_texts():
    model = model_of()
    streams = [module for module in model.modules() if isinstance(module, MoEStream)]
    before = [moe.rows for moe in streams]
    first, second = (stream(model, PROMPTS, Stopping(3), GREEDY) for _ in range(2))
    for steps in ([next(first), next(second)], [*first, *second]):
        assert steps and [moe.rows for moe in streams] == before


def test_texts_end_where_they_should():
    model = model_of()
    ids, reason = generate(model, [PROMPTS[0]], Stopping(NEW), GREEDY)[0]
    assert reason == "length" and len(ids) == NEW
    stop = next(token for i, token in enumerate(ids) if i >= 3 and token not in ids[:i])
    end = ids.index(stop) + 1
    given = Stopping(NEW, frozenset({stop}))
    assert generate(model, [PROMPTS[0]], given, GREEDY)[0] == (ids[:end], "stop_token")
    both = generate(model, PROMPTS[:2], given, GREEDY)
    assert both == [generate(model, [prompt], given, GREEDY)[0] for prompt in PROMPTS[:2]]

    def letters(ids) -> str:
        return "".join(chr(65 + i) for i in ids)

    string = letters(ids[1:3])  # of two tokens
    given = Stopping(NEW, strings=("never", string), decode=letters)
    stopped, reason = generate(model, [PROMPTS[0]], given, GREEDY)[0]
    assert reason == "stop_string" and stopped == ids[: letters(ids).index(string) + 2]
    assert given.text(stopped) == letters(ids).partition(string)[0]


def test_what_is_shown_of_a_text_never_changes_later():
    """Half a character, and what may become a stop string, is held back until it is known."""
    text = "ab END é ENTER ab"

    def decoded(ids) -> str:
        return bytes(ids).decode(errors="replace")

    ids, stopping = list(text.encode()), Stopping(99, strings=("ENDE", "TER "), decode=decoded)
    so_far = ""
    for n in range(1, len(ids) + 1):
        seen = stopping.text(ids[:n], ended="TER " in decoded(ids[:n]))
        assert seen.startswith(so_far) and text.startswith(seen)
        so_far = seen
    assert stopping.text(ids) == "ab END é EN" and so_far == "ab END é EN"
    assert (
        stopping.text(list(b"ab EN")) == "ab EN"
        and stopping.text(list(b"ab EN"), ended=False) == "ab "
    )


@pytest.mark.parametrize(
    ("prompts", "given", "says"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [1] * 32], {}, "prompt 1 has 32 tokens .* shorten the prompt"),
        ([[1] * 30], {}, "prompt 0 has 30 tokens .*, allowed: 32 .* reduce max_tokens to 2"),
        ([[1, 64]], {}, "prompt 0 has ids 1 to 64, allowed: 0 to 63"),
        ([[-1, 5]], {}, "prompt 0 has ids -1 to 5, allowed: 0 to 63"),
        ([[1]], {"seeds": [1, 2]}, "2 seeds"),
    ],
)
def test_bad_prompts_are_refused(prompts, given, says):
    with pytest.raises(ValueError, match=says):
        stream(model_of(), prompts, Stopping(3), **given)


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        stream(model_of().train(), PROMPTS, Stopping(3))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Sampling(temperature=-0.1), "temperature"),
        (lambda: Sampling(temperature=float("nan")), "temperature"),
        (lambda: Sampling(top_k=0), "top_k"),
        (lambda: Sampling(top_p=0.0), "top_p"),
        (lambda: Sampling(top_p=1.1), "top_p"),
        (lambda: Sampling(repetition_penalty=0.0), "repetition_penalty"),
        (lambda: Stopping(0), "max_tokens"),
        (lambda: Stopping(1, strings=("",), decode=str), "stop string"),
        (lambda: Stopping(1, strings=("a",)), "Stop strings"),
    ],
)
def test_bad_settings_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_a_draw_never_takes_a_token_that_was_removed():
    """Nor with deterministic algorithms, with which CUDA draws on the host: it has no deterministic
    cumsum."""
    logits_BV = torch.full((64, 8), -torch.inf)
    logits_BV[:, [2, 5]] = 0.0

    def drawn() -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(64)]
        return choose(
            logits_BV, Sampling(1.0, None), torch.zeros(64, 8, dtype=torch.bool), generators
        )

    plain = drawn()
    assert set(plain.tolist()) == {2, 5} and 16 < (plain == 2).sum() < 48
    try:
        torch.use_deterministic_algorithms(True)
        assert torch.equal(drawn(), plain)
    finally:
        torch.use_deterministic_algorithms(False)


def test_texts_of_several_ranks_are_refused_in_buffers():
    """Every rank sends as many rows as it has tokens itself, so different texts would not fit
    together."""
    model = model_of("position=pos2")
    for module in model.modules():
        if isinstance(module, MoEStream):
            module.rows = Buffers(2.0)
    with pytest.raises(ValueError, match=r"moe\.rows is buffers"):
        stream(model, PROMPTS, Stopping(2), passes=Passes(lambda statement: statement))


@pytest.mark.parametrize("text", ["\n\n  \n the union\n\nis", "\n\n", " the union", ""])
def test_a_text_on_the_screen_begins_without_blank_lines(text):
    pieces = list[str]()
    steps = (NewTokens([ord(letter)], [None]) for letter in text)
    stopping = Stopping(99, decode=lambda ids: "".join(map(chr, ids)))
    assert [step.ids[0] for step in shown(steps, stopping, pieces.append)] == [*map(ord, text)]
    first = next((line for line in text.split("\n") if line.strip()), "")
    assert "".join(pieces).strip() == text.strip() and "".join(pieces).startswith(first)
    assert "".join(pieces)[:1] != "\n"


def test_a_temperature_either_chooses_a_token_of_the_vocabulary_or_is_refused():
    logits_BV = 10 * torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    had_BV = torch.zeros(3, 10, dtype=torch.bool)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    chosen_B = choose(logits_BV, Sampling(temperature=1e-30), had_BV, generators)
    assert torch.equal(chosen_B, logits_BV.argmax(-1))
    with pytest.raises(ValueError, match="temperature is 1e-38"):
        Sampling(temperature=1e-38)


def test_a_text_ends_before_the_first_stop_string_in_any_order():
    for strings in (("bc", "abc"), ("abc", "bc")):
        stopping = Stopping(9, strings=strings, decode=lambda ids: bytes(ids).decode())
        assert stopping.text(list(b"xabcd")) == "x"


def test_no_token_is_drawn_from_logits_that_are_not_finite():
    with pytest.raises(ValueError, match=r"allowed: 0\.001 to 1000"):
        Sampling(repetition_penalty=1e-40)
    none = torch.zeros(1, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="not finite"):
        choose(torch.full((1, 8), float("nan")), Sampling(), none, [torch.Generator()])
