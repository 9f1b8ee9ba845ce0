"""Does the generated support task keep its promises: seeded, held out, answerable, within the grammar?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from runtime.models.reference import prompt, task

FOLDER = Path(prompt.__file__).parent
TOKENIZER: Tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def drawn(split: task.Split, count: int, seed: int = 7) -> list[task.Example]:
    rng = random.Random(seed)
    return [task.example(rng, split) for _ in range(count)]


def test_same_seed_same_desk_and_other_seed_other_desk() -> None:
    for draw in (task.corpus, task.accounts, lambda seed: task.questions(seed, 20)):
        assert draw(3) == draw(3)
        assert draw(3) != draw(4)


def test_desk_holds_only_what_training_never_shows() -> None:
    identities = {identity for one in drawn("training", 2000) for identity, _ in one.articles}
    sentences = {text for one in drawn("training", 2000) for _, text in one.articles}
    articles = task.corpus(0)
    assert len(articles) == 80
    assert not identities & {one.identity for one in articles}
    assert not sentences & {one.text for one in articles}
    assert all(task.subject_is_held_out(one.topic, one.product) for one in articles)
    assert all(task.is_held_out(int(one.number)) for one in task.accounts(0))


def test_digit_pairs_of_held_out_numbers_occur_in_training() -> None:
    kept = [number for number in range(10_000) if not task.is_held_out(number)]
    assert {number // 100 for number in kept} == set(range(100))
    assert {number % 100 for number in kept} == set(range(100))


def test_every_question_is_answerable_by_its_own_tenant() -> None:
    articles = {one.identity: one for one in task.corpus(1)}
    known = {one.number: one for one in task.accounts(1)}
    for asked in task.questions(1, 200):
        if asked.article is not None:
            article = articles[asked.article]
            assert article.tenant == asked.tenant
            assert json.loads(asked.expected[0]) == {"answer": article.text, "sources": [article.identity]}
        else:
            assert asked.account is not None
            assert known[asked.account].tenant == asked.tenant
            assert asked.account in asked.text


def test_one_article_a_subject_and_tenant() -> None:
    subjects = [(one.tenant, one.topic, one.product) for one in task.corpus(2)]
    assert len(set(subjects)) == len(subjects)


def test_expected_outputs_are_compact_and_obey_the_schema() -> None:
    validator = jsonschema.Draft202012Validator(prompt.output_schema())
    for output in [output for one in drawn("held_out", 300) for output in one.outputs]:
        document = json.loads(output)
        validator.validate(document)
        assert output == task.compact(document)


def test_prompt_of_a_turn_extends_prompt_and_output_of_the_turn_before() -> None:
    for one in drawn("held_out", 50):
        context = {"articles": one.articles, "account_records": one.account_records, "question": one.question}
        for turn in range(len(one.tool_results)):
            turns = list(zip(one.outputs, one.tool_results, strict=False))
            first = prompt.render(**context, turns=turns[:turn])  # type: ignore[arg-type]
            second = prompt.render(**context, turns=turns[: turn + 1])  # type: ignore[arg-type]
            written = TOKENIZER.encode(first).ids + TOKENIZER.encode(one.outputs[turn] + prompt.END).ids
            assert TOKENIZER.encode(second).ids[: len(written)] == written


def test_no_text_can_open_a_role() -> None:
    text = prompt.render(articles=[("P-0001", prompt.TOOL)], account_records=[prompt.USER], question=prompt.ASSISTANT)
    markers = [name for name in TOKENIZER.encode(text).tokens if name in prompt.SPECIAL_TOKENS]
    assert markers == [prompt.BEGIN, prompt.POLICY, prompt.ACCOUNT, prompt.USER, prompt.ASSISTANT]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_tokens_that_give_it_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(prompt.plain(text)).ids) == prompt.plain(text)


@pytest.mark.parametrize("number", ["00", "07", "48", "99"])
def test_a_pair_of_digits_is_one_token(number: str) -> None:
    assert TOKENIZER.encode(number).tokens == [number]


def test_tokenizer_file_is_what_the_builder_builds() -> None:
    from runtime.models.reference import tokenizer

    assert json.loads(tokenizer.build().to_str()) == json.loads((FOLDER / "tokenizer.json").read_text("utf-8"))
