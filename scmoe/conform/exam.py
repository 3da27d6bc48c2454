"""Asks a layer all questions on each number of ranks."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from scmoe.conform import equality
from scmoe.conform.equality import BFLOAT16, EXPECTED, ONE_ROUNDING, Difference, Tolerance
from scmoe.conform.plays import Record
from scmoe.conform.problem import TOKENS
from scmoe.conform.questions import CHECKPOINT, FIRST_QUESTIONS, OTHERS, RAISES, Question
from scmoe.conform.rank_pool import PlayCall, Played, RankPool

PLACES = {"1": (1, 1), "2": (2, 2), "4": (4, 4), "2x2": (4, 2)}  # ranks, and those of an EP group
PLACE_ALONE = "1"
ORDERS = 5  # of tokens, in which one process is measured
FAILURES = ("failed", "crashed", "timed out")


class Answer(NamedTuple):
    """answer: passed, failed, not asked, crashed or timed out. why: the reason, or where the
    difference is."""

    answer: str
    difference: Difference | None = None
    why: str = ""

    @property
    def ratio(self) -> float | None:
        return self.difference.ratio if self.difference else None


def pools_of(places: Sequence[str], preloaded: Sequence[str] = ()) -> dict[str, RankPool]:
    """Return ranks for these places and the measure. They start at the first question."""
    needed = dict.fromkeys([PLACE_ALONE, *places])
    return {ranks: RankPool(*PLACES[ranks], preloaded) for ranks in needed}


Answers = dict[str, dict[str, Answer]]  # by question, then by number of ranks


@dataclass
class Exam:
    """source: of `make`. pools: ranks by place, one of PLACES; "1" is needed as the measure.
    places: those that are asked. names: of the questions. limit_s: for each. progress: called with
    place and question before each.

    The pools are the caller's, who closes them: starting ranks takes longer than all questions.
    """

    source: str
    dtype: str
    pools: Mapping[str, RankPool]
    places: Sequence[str]
    names: Sequence[str]
    limit_s: float
    progress: Callable[[str, str], None]

    def __post_init__(self) -> None:
        self.plays: dict[tuple[str, str], Played] = {}
        self.spreads: dict[tuple[str, int], Tolerance] = {}
        # kinds of tensors that the first questions have found wrong
        self.reported: dict[str, set[str]] = {ranks: set() for ranks in self.places}

    def run(self) -> Answers:
        answers: Answers = {}
        for question in (*FIRST_QUESTIONS, *OTHERS):
            if question.name in self.names:
                answers[question.name] = self._on_all(question.name, question)
        for name in (CHECKPOINT, RAISES):
            if name in self.names:
                answers[name] = self._on_all(name, None)
        return answers

    def _on_all(self, name: str, question: Question | None) -> dict[str, Answer]:
        answers = {}
        for ranks in self.places:
            self.progress(ranks, name)
            if question is not None:
                answers[ranks] = self._answer(question, ranks)
            elif name == CHECKPOINT:
                answers[ranks] = self._checkpoint(ranks)
            else:
                answers[ranks] = self._raises(ranks)
        return answers

    def _asked(self, play: str, *arguments: str) -> PlayCall:
        return PlayCall(self.source, play, self.dtype, arguments=arguments)

    def _play(self, play: str, place: str) -> Played:
        """Play once, whatever the number of questions about it."""
        if (play, place) not in self.plays:
            asked = self._asked(play)
            self.plays[play, place] = self.pools[place].ask(asked, self.limit_s)
        return self.plays[play, place]

    def _answer(self, question: Question, place: str) -> Answer:
        if question.play == "without rows" and place == PLACE_ALONE:
            return Answer("not asked", why="there is no other rank")
        played = self._play(question.play, place)
        if played.outcome != "played":
            return Answer(played.outcome, why=played.why)
        kinds = [kind for kind in question.kinds if kind not in self.reported[place]]
        measure, tolerance = self._measure(question, place)
        named = {equality.kind_of(name) for name in (*measure, *played.records[0])}
        compared = [kind for kind in kinds if kind in named]
        if not kinds or self.reported[place] & {*question.follows}:
            return Answer("not asked", why="gradients are wrong already in the first questions")
        if not compared:
            return Answer("not asked", why=f"the adapter names no {' or '.join(kinds)}")
        if not self._can_compare(compared, played.records[0], measure):
            return self._without_measure(question.play)

        difference = equality.first_difference(played.records, measure, compared, tolerance)
        if difference is None:
            return Answer("passed")
        if question in FIRST_QUESTIONS:
            self.reported[place] |= {*question.kinds}
        return Answer("failed", difference)

    def _without_measure(self, play: str) -> Answer:
        """Return why nothing can be compared: one process has failed, or it is what is asked."""
        alone = self.plays.get((play, PLACE_ALONE))
        if alone is not None and alone.outcome in FAILURES:
            return Answer(alone.outcome, why=f"one process, which is the measure: {alone.why}")
        return Answer("not asked", why="there is no measure: one process is the measure")

    def _can_compare(self, kinds: list[str], record: Record, measure: Record) -> bool:
        alone = [name.removeprefix(EXPECTED) for name in record if name.startswith(EXPECTED)]
        return any(equality.kind_of(name) in kinds for name in (*measure, *alone))

    # ------------------------------------------------------------------ the measure

    def _measure(self, question: Question, place: str) -> tuple[Record, Tolerance]:
        """Return what one process plays, and the tolerance of each kind.

        It is the layer's formula, where it has one, and the layer itself in one process for the
        rest. One rank is measured by the formula alone. In bfloat16 formula and layer round
        differently, so the layer is the only measure.
        """
        formula, alone = self._formula(question.play), Played("not asked")
        if place != PLACE_ALONE:
            alone = self._play(question.play, PLACE_ALONE)
        measure: Record = {}
        for played in (alone, formula):
            if played.outcome == "played":
                measure |= played.records[0]
        if question.exact:
            return measure, dict.fromkeys(question.kinds, 0.0)
        if self.dtype == BFLOAT16:
            return measure, self._rounding(question, PLACES[place][0])
        return measure, equality.fixed(self.dtype, question.kinds)

    def _formula(self, play: str) -> Played:
        if self.dtype == BFLOAT16:
            return Played("not asked")
        key = (play, "formula")
        if key not in self.plays:
            asked = self._asked(play)._replace(plain=True)
            self.plays[key] = self.pools[PLACE_ALONE].ask(asked, self.limit_s)
        return self.plays[key]

    def _rounding(self, question: Question, pieces: int) -> Tolerance:
        """Return the spread of a question's play and of a usual pass, whichever is larger: a play
        that changes its tokens runs them in one piece."""
        spreads = [self._spread(play, pieces) for play in ("whole", question.play)]
        return {
            kind: max(ONE_ROUNDING, *(spread.get(kind, 0.0) for spread in spreads))
            for kind in question.kinds
        }

    def _spread(self, play: str, pieces: int) -> Tolerance:
        """Return the spread of one process by kind; empty if it cannot play this."""
        first = self._play(play, PLACE_ALONE)
        if first.outcome != "played":
            return {}
        if (play, pieces) not in self.spreads:
            generator = torch.Generator().manual_seed(0)
            others: list[Record] = []
            for _ in range(ORDERS):
                order = tuple(torch.randperm(TOKENS, generator=generator).tolist())
                asked = self._asked(play)._replace(order=order, pieces=pieces)
                others += self.pools[PLACE_ALONE].ask(asked, self.limit_s).records
            self.spreads[play, pieces] = equality.spread(first.records[0], others)
        return self.spreads[play, pieces]

    # ------------------------------------------------------------------ other questions

    def _checkpoint(self, place: str) -> Answer:
        """Save on these ranks, then load on every number of ranks, this one too."""
        with tempfile.TemporaryDirectory() as folder:
            saved = self.pools[place].ask(self._asked("saved", folder), self.limit_s)
            if saved.outcome != "played":
                return Answer(saved.outcome, why=saved.why)
            answers = [self._load(place, other, folder) for other in self.places]
        order = [*FAILURES, "passed", "not asked"]
        return min(answers, key=lambda answer: order.index(answer.answer))

    def _load(self, place: str, other: str, folder: str) -> Answer:
        where = f"saved on {place}, loaded on {other}: "
        loaded = self.pools[other].ask(self._asked("loaded", folder), self.limit_s)
        if loaded.outcome != "played":
            return Answer(loaded.outcome, why=where + loaded.why)
        exact = {"loaded": 0.0}
        difference = equality.first_difference(loaded.records, {}, ["loaded"], exact)
        return Answer("failed", difference, where) if difference else Answer("passed")

    def _raises(self, place: str) -> Answer:
        """Let one rank raise; all others must end in time. The layer must work where none
        raises."""
        usual = self._play("whole", place)
        if usual.outcome != "played":
            return Answer(usual.outcome, why=usual.why)
        pool = self.pools[place]
        played = pool.ask(self._asked("raising"), self.limit_s, grace_s=self.limit_s)
        if played.outcome == "not asked":
            return Answer("not asked", why=played.why)
        if played.silent:
            ranks = ", ".join(map(str, played.silent))
            why = f"rank {ranks} did not end within {self.limit_s:g} s after another rank raised"
            return Answer("timed out", why=why)
        return Answer("passed")
