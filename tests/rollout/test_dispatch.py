"""The pool's books against any order of events: hypothesis plays workers that finish, fail, die, hang, answer twice and too late."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from raysys.rollout.dispatch import Dispatcher

SEATS, TOKENS, RETRIES = 3, 100, 2


class Books(RuleBasedStateMachine):
    """What was asked for ends exactly once; `said` remembers everything that was ever handed out, so that ghosts can answer."""

    said = Bundle("said")

    @initialize()
    def begin(self) -> None:
        self.books = Dispatcher(RETRIES)
        self.now, self.names = 0.0, 0
        self.asked: set[int] = set()
        self.ended: dict[int, str] = {}
        self.failures: dict[int, int] = {}

    @rule(cost=st.integers(1, 140), wave=st.integers(0, 3))
    def ask(self, cost: int, wave: int) -> None:
        number = self.books.add(cost, wave)
        assert number not in self.asked
        self.asked.add(number)
        self.failures[number] = 0

    @rule()
    def join(self) -> None:
        self.books.join(f"w{self.names}", SEATS, TOKENS)
        self.names += 1

    @rule(target=said)
    def assign(self):
        self.now += 1
        given = self.books.assign(self.now)
        for name, numbers in given.items():
            load = self.books.workers[name]
            cached = load.away > 0 and load.load <= load.tokens
            assert cached or len(load.held) <= load.seats + load.ahead + load.away
            assert len(load.held) == 1 or load.load <= load.tokens * 2
            last = [number for number in load.held if self.failures[number] == RETRIES]
            assert not last or len(load.held) == 1, "a ticket on its last try has the worker to itself"
            assert all(number in load.held for number in numbers)
        return multiple(*[(name, number) for name, numbers in given.items() for number in numbers])

    @rule(pair=consumes(said) | said)
    def finish(self, pair: tuple[str, int]) -> None:
        """Whoever ever had it answers: only the one that has it now is heard, and only once."""
        name, number = pair
        has = number in self.books.tickets and self.books.tickets[number].worker == name
        assert self.books.finish(name, number) == has
        if has:
            self._end(number, "finished")

    @rule(pair=said, retry=st.booleans())
    def fail(self, pair: tuple[str, int], retry: bool) -> None:
        name, number = pair
        ticket = self.books.tickets.get(number)
        has = ticket is not None and ticket.worker == name
        dead = self.books.fail(name, number, "cause", retry)
        if has:
            self.failures[number] += 1
            assert dead == (not retry or self.failures[number] > RETRIES)
        else:
            assert not dead
        if dead:
            self._end(number, "dead")

    @rule(pair=said)
    def die(self, pair: tuple[str, int]) -> None:
        name, _ = pair
        load = self.books.workers.get(name)
        held = set(load.held) if load is not None else set()
        dead = {ticket.number for ticket in self.books.leave(name, "died")}
        for number in held:
            self.failures[number] += 1
            assert (number in dead) == (self.failures[number] > RETRIES)
            if number in dead:
                self._end(number, "dead")
        assert name not in self.books.workers

    @rule(limit=st.floats(0, 5))
    def time_out(self, limit: float) -> None:
        for name, number in self.books.overdue(self.now, limit):
            assert self.books.tickets[number].worker == name and self.now - self.books.tickets[number].since > limit
            self.failures[number] += 1
            if self.books.fail(name, number, "late"):
                self._end(number, "dead")

    @rule(pair=said)
    def drop(self, pair: tuple[str, int]) -> None:
        _, number = pair
        if number in self.books.tickets:
            has = self.books.tickets[number].worker
            assert self.books.drop(number) == has
            self._end(number, "dropped")

    def _end(self, number: int, how: str) -> None:
        assert number not in self.ended, f"{number} ended as {self.ended[number]} and again as {how}"
        self.ended[number] = how

    @invariant()
    def nothing_is_lost_and_nothing_is_with_two(self) -> None:
        assert self.asked == set(self.books.tickets) | set(self.ended)
        assert not set(self.books.tickets) & set(self.ended)
        held = [number for load in self.books.workers.values() for number in load.held]
        assert len(held) == len(set(held))
        assert set(held) == {ticket.number for ticket in self.books.tickets.values() if ticket.worker}
        for load in self.books.workers.values():
            assert load.load == sum(self.books.tickets[number].cost for number in load.held)

    def teardown(self) -> None:
        """From any state, one worker that does its work brings everything to an end."""
        for name in list(self.books.workers):
            for ticket in self.books.leave(name, "the end"):
                self._end(ticket.number, "dead")
        self.books.join("last", SEATS, TOKENS)
        for _ in range(10 * len(self.asked) + 10):
            for name, numbers in self.books.assign(self.now).items():
                for number in numbers:
                    assert self.books.finish(name, number)
                    self._end(number, "finished")
        assert set(self.ended) == self.asked and not self.books.tickets


Books.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase


def test_work_goes_where_the_kv_cache_has_room_and_the_longest_first() -> None:
    books = Dispatcher(RETRIES)
    books.join("small", 10, 100)
    books.join("large", 10, 300)
    numbers = [books.add(cost, 0) for cost in (10, 40, 20, 90, 30, 30, 60)]
    given = books.assign(0.0)
    shares = {name: load.share for name, load in books.workers.items()}
    assert sorted(number for held in given.values() for number in held) == numbers and abs(shares["small"] - shares["large"]) < 0.35
    cost = {number: books.tickets[number].cost for number in numbers}
    for given_to in given.values():
        assert [cost[number] for number in given_to] == sorted((cost[number] for number in given_to), reverse=True)


def test_an_earlier_wave_goes_first_whatever_its_size() -> None:
    books = Dispatcher(RETRIES)
    late, early = books.add(90, 5), books.add(1, 4)
    books.join("only", 1, 100)
    books.workers["only"].ahead = 0
    assert books.assign(0.0) == {"only": [early]}
    assert books.finish("only", early) and books.assign(0.0) == {"only": [late]}


def test_a_fast_worker_is_given_more_ahead_than_a_slow_one_and_never_more_than_a_wave() -> None:
    books = Dispatcher(RETRIES)
    for name, pace in (("slow", 0.1), ("fast", 40.0), ("fastest", 1e6)):
        books.join(name, 16, 10**6)
        books.pace(name, pace)
    assert [books.workers[name].ahead for name in ("slow", "fast", "fastest")] == [1, 10, 16]


def test_whoever_is_away_with_a_tool_leaves_its_seat_to_one_more() -> None:
    books = Dispatcher(RETRIES)
    books.join("only", 4, 40)
    books.pace("only", per_second=2.0, away=2.5)
    for _ in range(20):
        books.add(10, 0)
    assert len(books.assign(0.0)["only"]) == 4 + 1 + 5, "seats, one to wait, and those who are away, whom the KV cache does not hold"
    books.pace("only", per_second=2.0)
    assert not books.assign(0.0) and books.crowded


def test_where_samples_go_away_as_many_begin_as_the_cache_has_room_for() -> None:
    books = Dispatcher(RETRIES)
    books.join("only", 4, 150)
    for _ in range(20):
        books.add(10, 0)
    assert len(books.assign(0.0)["only"]) == 8, "until it is known that they do"
    books.pace("only", per_second=2.0, away=0.5)
    assert len(books.assign(0.0)["only"]) == 7 and books.workers["only"].share == 1.0 and books.crowded
