"""Properties 9 to 11 of the method, step scores against their definition, and the distance of texts against the plain table."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest

from raysys.methods.calibadv_steps import silver_documents, step_scores


def rollout(*steps: str, valid: bool = True, reward: float = 1.0, thinks: list[str] | None = None) -> dict[str, Any]:
    """Each step is a text of one-letter documents; thinkings have nothing in common unless given."""
    thinks = thinks or [f"thought {number} of {id(steps)}" * (number + 1) for number in range(len(steps))]
    return {"valid": valid, "reward": reward, "steps": [{"think": t, "doc_ids": list(s)} for t, s in zip(thinks, steps, strict=True)]}


def plain_distance(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def slow(group: list[dict[str, Any]], threshold: float, similarity: float, shared: int) -> list[list[float] | None]:
    good = [one for one in group if one["valid"] and one["reward"] >= threshold]
    if not good:
        return [None for _ in group]
    best = max(one["reward"] for one in good)
    silver = {d for one in good if one["reward"] == best for step in one["steps"] for d in step["doc_ids"]}
    out: list[list[float] | None] = []
    for one in group:
        if not one["valid"]:
            out.append(None)
            continue
        seen, scores = [], []
        for index, step in enumerate(one["steps"]):
            hit = 0
            for document in step["doc_ids"]:
                hit += document in silver and document not in seen
                seen.append(document)
            for earlier in one["steps"][:index]:
                a, b = step["think"].split(), earlier["think"].split()
                alike = 1 - plain_distance(a, b) / max(len(a), len(b)) if a or b else 0.0
                if alike > similarity or len(set(step["doc_ids"]) & set(earlier["doc_ids"])) > shared:
                    hit = 0
            scores.append(hit / len(step["doc_ids"]) if step["doc_ids"] else 0.0)
        out.append(scores)
    return out


def random_group(dice: random.Random) -> list[dict[str, Any]]:
    group = []
    for _ in range(dice.randint(1, 6)):
        steps = ["".join(dice.choices("abcdefghij", k=dice.choice([0, 1, 3, 3, 3]))) for _ in range(dice.randint(1, 4))]
        thinks = [" ".join(dice.choices("uvwx", k=dice.randint(0, 8))) for _ in steps]
        group.append(rollout(*steps, valid=dice.random() < 0.8, reward=dice.choice([0, 0.5, 0.7, 0.8, 1.0]), thinks=thinks))
    return group


def test_step_scores_are_their_definition():
    dice = random.Random(0)
    kinds = set()
    for _ in range(1_500):
        group = random_group(dice)
        options = {
            "threshold": dice.choice([0.5, 0.7, 1.0]),
            "similarity": dice.choice([0.0, 0.4, 0.5, 1.0]),
            "shared": dice.choice([0, 1, 2]),
        }
        found = step_scores(group, **options)
        assert found == slow(group, **options)
        kinds |= {score for scores in found if scores is not None for score in scores}
    assert {0.0, 1 / 3, 2 / 3, 1.0} <= kinds


def test_9_a_repeated_result_list_scores_nothing():
    assert step_scores([rollout("abc", "abc", "def", "cba")]) == [[1.0, 0.0, 1.0, 0.0]]


def test_9_one_shared_document_is_no_veto_two_are():
    assert step_scores([rollout("abc", "ade", "bcf")]) == [[1.0, 2 / 3, 0.0]]
    # One of each of two earlier steps is not two of one.
    assert step_scores([rollout("abc", "def", "adg")]) == [[1.0, 1.0, 1 / 3]]
    assert step_scores([rollout("abc", "bcf")], shared=2) == [[1.0, 1 / 3]]
    assert step_scores([rollout("abc", "ade")], shared=0) == [[1.0, 0.0]]


def test_9_a_silver_document_counts_once_in_a_rollout():
    best, other = rollout("abc"), rollout("axy", "bza", reward=0.0)
    assert step_scores([best, other]) == [[1.0], [1 / 3, 1 / 3]]
    # What a vetoed step was shown is no news later.
    assert step_scores([rollout("abc", "def"), rollout("axy", "dxy", "dzw", reward=0.0)])[1] == [1 / 3, 0.0, 0.0]


def test_9_a_contributors_first_step_is_right_unless_it_repeats_a_document():
    dice = random.Random(1)
    for _ in range(200):
        group = random_group(dice)
        top = max((one["reward"] for one in group if one["valid"]), default=0)
        for one, scores in zip(group, step_scores(group), strict=True):
            first = one["steps"][0]["doc_ids"]
            if scores is not None and one["reward"] == top and first:
                assert scores[0] == len(set(first)) / len(first)
    assert step_scores([rollout("aab")]) == [[2 / 3]]


def test_9_thinking_like_an_earlier_one_is_a_veto():
    """Half of the words unchanged is not above one half; case counts; the veto looks at every earlier step."""

    def second(first: str, later: str) -> float:
        scores = step_scores([rollout("abc", "def", thinks=[first, later])])[0]
        assert scores is not None
        return scores[1]

    assert second("a b c d", "a b x y") == 1.0
    assert second("a b c d", "a b c y") == 0.0
    assert second("a b c d", "A B C D") == 1.0
    assert second("", "") == second("a", "") == second("", "a b") == 1.0
    assert second("d c b a", "a b c d") == 1.0  # as many words in common as there can be, in another order
    assert step_scores([rollout("abc", "def", "ghi", thinks=["a b c", "x y z", "a b c d"])]) == [[1.0, 1.0, 0.0]]


def test_10_nobody_at_the_threshold_means_no_scores():
    group = [rollout("abc", reward=0.69), rollout("abc", reward=1.0, valid=False)]
    assert step_scores(group) == [None, None] and silver_documents(group) == set()
    assert step_scores(group, threshold=0.6) == [[1.0], None]
    assert step_scores([]) == []


def test_10_a_higher_reward_alone_makes_the_set():
    equal = [rollout("abc", reward=0.8), rollout("def", reward=0.8), rollout("adx", reward=0.0)]
    assert silver_documents(equal) == set("abcdef") and step_scores(equal) == [[1.0], [1.0], [2 / 3]]
    higher = [rollout("abc", reward=0.9), *equal[1:]]
    assert silver_documents(higher) == set("abc") and step_scores(higher) == [[1.0], [0.0], [1 / 3]]


def test_11_invalid_rollouts_get_nothing_and_give_nothing():
    group = [rollout("abc", valid=False, reward=1.0), rollout("axy", reward=0.8), rollout("abx", valid=False, reward=0.0)]
    assert silver_documents(group) == set("axy") and step_scores(group) == [None, [1.0], None]


def test_the_papers_ratio_has_no_vetoes_and_takes_all_correct_rollouts():
    group = [rollout("abc", "abd", reward=1.0, thinks=["same", "same"]), rollout("aeg", reward=0.7), rollout("aax", "", reward=0.0)]
    assert silver_documents(group, form="paper") == set("abcdeg") and silver_documents(group) == set("abcd")
    assert step_scores(group, form="paper") == [[1.0, 1.0], [1.0], [0.5, 0.0]]
    assert step_scores([rollout("abc", reward=0.0)], form="paper") == [None]


def test_what_rollouts_hold_is_left_alone_and_order_does_not_matter():
    dice = random.Random(2)
    for _ in range(100):
        group = random_group(dice)
        before, found = repr(group), step_scores(group)
        assert repr(group) == before
        order = dice.sample(range(len(group)), len(group))
        assert step_scores([group[i] for i in order]) == [found[i] for i in order]


def test_long_thinkings_are_alike_as_the_plain_table_says():
    dice = random.Random(3)
    found = []
    for _ in range(400):
        words = "abcdefghijklmnop"[: dice.choice([1, 2, 4, 16])]
        a, b = (dice.choices(words, k=dice.choice([1, 5, dice.randint(1, 90)])) for _ in range(2))
        share = dice.choice([0.1, 0.3, 0.5, 0.8])
        scores = step_scores([rollout("abc", "def", thinks=[" ".join(a), " ".join(b)])], similarity=share)[0]
        longest = max(len(a), len(b))
        found.append(Fraction(longest - plain_distance(a, b), longest) > Fraction(share))
        assert scores == [1.0, 0.0 if found[-1] else 1.0]
    assert 50 < sum(found) < 350


@pytest.mark.parametrize("longest", range(1, 40))
def test_likeness_is_exact_at_its_bound(longest):
    """The first `kept` of `longest` words unchanged: alike above the share, whatever rounding does."""
    words = [f"w{i}" for i in range(longest)]
    for kept in range(longest + 1):
        changed = words[:kept] + [f"x{i}" for i in range(longest - kept)]
        for share in (0.5, 0.25, 1.0):
            scores = step_scores([rollout("abc", "def", thinks=[" ".join(words), " ".join(changed)])], similarity=share)[0]
            assert scores == [1.0, 0.0 if Fraction(kept, longest) > Fraction(share) else 1.0]


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        ([{"valid": True, "steps": []}], {}, "rollouts[0] has no reward; it has valid, steps"),
        ([{"valid": True, "reward": 1.0}], {}, "rollouts[0] has no steps"),
        ([rollout("a"), {"reward": 1.0, "steps": []}], {}, "rollouts[1] has no valid"),
        ([{"valid": True, "reward": 1.0, "steps": [{"think": "t"}]}], {}, "rollouts[0].steps[0] has no doc_ids"),
        ([{"valid": True, "reward": 1.0, "steps": [{"doc_ids": []}]}], {}, "rollouts[0].steps[0] has no think"),
        (
            [{"valid": True, "reward": 1.0, "steps": [{"think": "t", "doc_ids": "abc"}]}],
            {},
            "doc_ids must be a list of ids, got the text 'abc'",
        ),
        ([rollout("a", reward=math.nan)], {}, "rollouts[0]: reward must be finite, got nan"),
        ([], {"threshold": math.inf}, "threshold must be finite, got inf"),
        ([], {"similarity": 1.5}, "similarity must lie in [0, 1], got 1.5"),
        ([], {"similarity": math.nan}, "similarity must lie in [0, 1], got nan"),
        ([], {"shared": -1}, "shared must be an integer of at least 0, got -1"),
        ([], {"shared": 0.5}, "shared must be an integer of at least 0, got 0.5"),
        ([], {"form": "old"}, "form must be one of code, paper, got 'old'"),
    ],
)
def test_bad_input_names_the_argument(group, options, message):
    with pytest.raises(ValueError) as error:
        step_scores(group, **options)
    assert message in str(error.value)
