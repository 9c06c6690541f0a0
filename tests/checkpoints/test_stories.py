"""The grammar that the tiny checkpoint is trained on, and the checker that judges its texts."""

import random
import re

import pytest
from stories import Grammar

STORY = (
    "Anna went to the market. The sky was blue and the sun was high. She was looking for a red "
    "apple. The apple cost two coins, and she had five. She paid and had three coins left. On "
    "the way home, she met Tom. She showed the red apple to Tom, and he smiled. She was tired "
    "but very happy."
)


@pytest.fixture(scope="module")
def grammar():
    return Grammar()


def test_every_story_told_is_accepted(grammar):
    rng = random.Random(5)
    told = [grammar.tell(rng) for _ in range(300)]
    assert all(grammar.is_story(story.text) for story in told)
    assert not any(grammar.strange_sentences(story.text) for story in told[:40])
    assert all(story.nats > 5 for story in told)
    assert len({story.text for story in told}) == len(told)


def test_the_same_seed_tells_the_same_story(grammar):
    assert grammar.tell(random.Random(7)) == Grammar().tell(random.Random(7))


def test_a_hand_written_story_is_accepted(grammar):
    assert grammar.is_story(STORY)
    assert grammar.strange_sentences(STORY) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("She was looking", "He was looking"),
        ("The apple cost", "The pear cost"),
        ("had three coins left", "had four coins left"),
        ("the red apple to Tom", "the red apple to Ben"),
        ("and he smiled", "and she smiled"),
        ("the market", "the bakery"),
        ("On the way home, she met Tom. ", ""),
        (" She was tired but very happy.", ""),
        ("tired but very happy.", "tired but very happy"),
        ("a red apple", "an red apple"),
    ],
)
def test_a_contradiction_is_not_a_story(grammar, right, wrong):
    assert STORY.count(right) == 1
    assert not grammar.is_story(STORY.replace(right, wrong))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("a red apple", "a the apple"),
        ("she met Tom", "she meet Tom"),
        ("coins left.", "coins left left."),
        ("Anna went", "anna went"),
    ],
)
def test_a_sentence_from_nowhere_is_named(grammar, right, wrong):
    assert STORY.count(right) == 1
    strange = grammar.strange_sentences(STORY.replace(right, wrong))
    assert any(wrong in sentence for sentence in strange)


def test_articles_fit_the_word_after_them(grammar):
    rng = random.Random(11)
    text = " ".join(grammar.tell(rng).text for _ in range(400))
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n (?!hour)[^aeiou]", text)
    assert "{" not in text
    assert "  " not in text
