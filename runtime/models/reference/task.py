"""What does the synthetic support desk ask, know and expect?

Everything comes from a seed. Two halves never meet: identifiers and (topic, product) pairs are split by arithmetic
into those used for training and those held out, so a held-out question never has an article, an account number or a
subject that training has shown. `corpus`, `accounts` and `questions` draw from the held-out half only.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, Literal

from runtime.models.reference.prompt import TICKET_TOPICS
from runtime.models.reference.wording import (
    ACCOUNT_FIELDS,
    ASIDES,
    OPENINGS,
    PLANS,
    POLICIES,
    PRODUCTS,
    STATUSES,
    TICKET_REQUESTS,
    TOPICS,
)

Split = Literal["training", "held_out"]
Kind = Literal["policy", "lookup", "record", "ticket"]

TENANTS = ("aurora", "borealis")


@dataclass(frozen=True, slots=True)
class Article:
    """One policy article; `identity` is like P-4817 and `text` one sentence."""

    identity: str
    tenant: str
    topic: str
    product: str
    value: int
    text: str


@dataclass(frozen=True, slots=True)
class Account:
    """One customer account; `number` has four digits, balance is in dollars."""

    number: str
    tenant: str
    plan: str
    status: str
    balance: int
    orders: int


@dataclass(frozen=True, slots=True)
class Question:
    """A customer's question with what a correct desk does.

    expected holds one output, or two when a tool call comes first; the second one of a ticket names the ticket
    in a place written `{ticket}`, because the ticket system chooses its number.
    """

    tenant: str
    text: str
    kind: Kind
    expected: tuple[str, ...]
    article: str | None
    account: str | None


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its full context: what `prompt.render` takes, and the outputs turn by turn."""

    articles: tuple[tuple[str, str], ...]
    account_records: tuple[str, ...]
    question: str
    outputs: tuple[str, ...]
    tool_results: tuple[str, ...]
    kind: Kind


def compact(document: dict[str, Any]) -> str:
    """Return JSON without spaces in the given key order: the form of all outputs and tool results."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def account_record(account: Account) -> str:
    """Return the account as the look-up tool answers it and as known accounts stand in a prompt."""
    fields = {"account": account.number, "plan": account.plan, "status": account.status}
    return compact(fields | {"balance": str(account.balance), "orders": str(account.orders)})


def ticket_record(ticket: str, *, account: str, topic: str) -> str:
    """Return a created ticket as the ticket tool answers it; ticket is like T-0031."""
    return compact({"ticket": ticket, "account": account, "topic": topic})


def answer(text: str, source: str) -> str:
    """Return a final answer with its one source."""
    return compact({"answer": text, "sources": [source]})


def is_held_out(number: int) -> bool:
    """Say whether an identifier's four digits belong to the held-out half: one in eight, over all digit pairs."""
    return (number // 100 + number % 100) % 8 == 0


def subject_is_held_out(topic: str, product: str) -> bool:
    """Say whether the pair of topic and product is held out: one in four, over all topics and products."""
    return (TOPICS.index(topic) * 5 + PRODUCTS.index(product) * 3) % 4 == 0


def _number(rng: random.Random, split: Split) -> str:
    while True:
        number = rng.randrange(10_000)
        if is_held_out(number) == (split == "held_out"):
            return f"{number:04d}"


def _numbers(rng: random.Random, split: Split, count: int) -> list[str]:
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen[_number(rng, split)] = None
    return list(chosen)


def _subjects(split: Split) -> list[tuple[str, str]]:
    wanted = split == "held_out"
    pairs = [(topic, product) for topic in TOPICS for product in PRODUCTS]
    return [pair for pair in pairs if subject_is_held_out(*pair) == wanted]


SUBJECTS: dict[Split, tuple[tuple[str, str], ...]] = {
    "training": tuple(_subjects("training")),
    "held_out": tuple(_subjects("held_out")),
}


def _article(rng: random.Random, identity: str, tenant: str, subject: tuple[str, str]) -> Article:
    topic, product = subject
    value = rng.randrange(2, 100)
    return Article(f"P-{identity}", tenant, topic, product, value, POLICIES[topic][0].format(p=product, n=value))


def _account(rng: random.Random, number: str, tenant: str) -> Account:
    return Account(number, tenant, rng.choice(PLANS), rng.choice(STATUSES), rng.randrange(100), rng.randrange(2, 30))


def corpus(seed: int, *, per_tenant: int = 40) -> tuple[Article, ...]:
    """Return held-out articles of both tenants, one a subject and tenant; tenants share subjects, not values."""
    rng = random.Random(f"corpus {seed}")
    identities = _numbers(rng, "held_out", per_tenant * len(TENANTS))
    articles: list[Article] = []
    for tenant in TENANTS:
        for subject in rng.sample(SUBJECTS["held_out"], per_tenant):
            articles.append(_article(rng, identities.pop(), tenant, subject))
    return tuple(articles)


def accounts(seed: int, *, per_tenant: int = 60) -> tuple[Account, ...]:
    """Return held-out accounts of both tenants; no number occurs twice."""
    rng = random.Random(f"accounts {seed}")
    numbers = _numbers(rng, "held_out", per_tenant * len(TENANTS))
    return tuple(_account(rng, numbers.pop(), tenant) for tenant in TENANTS for _ in range(per_tenant))


def _policy_text(rng: random.Random, article: Article, other_account: str | None) -> str:
    aside = rng.choice(ASIDES).format(a=other_account) if other_account else ""
    return rng.choice(OPENINGS) + aside + rng.choice(POLICIES[article.topic][1]).format(p=article.product)


def _field_question(rng: random.Random, account: Account) -> tuple[str, str]:
    """Return a question about one field of the account, and its final answer."""
    field, (phrasings, sentence) = rng.choice(list(ACCOUNT_FIELDS.items()))
    text = rng.choice(OPENINGS) + rng.choice(phrasings).format(a=account.number)
    final = answer(sentence.format(a=account.number, v=getattr(account, field)), f"A-{account.number}")
    return text, final


def lookup_call(account: str) -> str:
    """Return the tool call that looks an account up."""
    return compact({"tool": "lookup_account", "arguments": {"account": account}})


def ticket_call(account: str, topic: str) -> str:
    """Return the tool call that opens a ticket."""
    return compact({"tool": "create_ticket", "arguments": {"account": account, "topic": topic}})


def ticket_answer(ticket: str, account: str) -> str:
    """Return the final answer after a ticket was opened."""
    return answer(f"Ticket {ticket} is open for account {account}.", ticket)


def _ticket_text(rng: random.Random, account: str, topic: str) -> str:
    return rng.choice(OPENINGS) + rng.choice(TICKET_REQUESTS).format(a=account, t=topic, p=rng.choice(PRODUCTS))


def questions(seed: int, count: int) -> tuple[Question, ...]:
    """Return questions over `corpus(seed)` and `accounts(seed)`, tenants in turn, each answerable by its own tenant."""
    rng = random.Random(f"questions {seed}")
    articles, known = corpus(seed), accounts(seed)
    result: list[Question] = []
    for index in range(count):
        tenant = TENANTS[index % len(TENANTS)]
        account = rng.choice([one for one in known if one.tenant == tenant])
        kind = rng.choices(("policy", "lookup", "ticket"), (5, 3, 2))[0]
        if kind == "policy":
            article = rng.choice([one for one in articles if one.tenant == tenant])
            text = _policy_text(rng, article, account.number if rng.random() < 0.25 else None)
            expected = (answer(article.text, article.identity),)
            result.append(Question(tenant, text, "policy", expected, article.identity, None))
        elif kind == "lookup":
            text, final = _field_question(rng, account)
            result.append(Question(tenant, text, "lookup", (lookup_call(account.number), final), None, account.number))
        else:
            topic = rng.choice(TICKET_TOPICS)
            text = _ticket_text(rng, account.number, topic)
            expected = (ticket_call(account.number, topic), ticket_answer("{ticket}", account.number))
            result.append(Question(tenant, text, "ticket", expected, None, account.number))
    return tuple(result)


def _distractors(rng: random.Random, split: Split, subject: tuple[str, str], count: int) -> list[tuple[str, str]]:
    """Return other subjects as full-text search would bring them: most share the topic or the product."""
    topic, product = subject
    pools = (
        [one for one in SUBJECTS[split] if one[0] == topic],
        [one for one in SUBJECTS[split] if one[1] == product],
        SUBJECTS[split],
    )
    weights = rng.choices(((8, 1, 1), (2, 7, 1), (3, 3, 4)), (5, 2, 4))[0]
    chosen: dict[tuple[str, str], None] = {subject: None}
    while len(chosen) <= count:
        chosen[rng.choice(rng.choices(pools, weights)[0])] = None
    return [one for one in chosen if one != subject]


def example(rng: random.Random, split: Split, *, most_articles: int = 4, kind: Kind | None = None) -> Example:
    """Draw one example with its context: one to four articles in any order, sometimes known account records."""
    kind = kind or rng.choices(("policy", "lookup", "record", "ticket"), (48, 22, 12, 18))[0]
    subject = rng.choice(SUBJECTS[split])
    least = 1 if kind == "policy" else 0
    count = max(rng.randint(least, most_articles), rng.randint(least, most_articles))  # search mostly finds four
    subjects = [subject, *_distractors(rng, split, subject, count - 1)] if count else []
    identities = _numbers(rng, split, count)
    articles = [_article(rng, identity, "", one) for identity, one in zip(identities, subjects, strict=True)]
    target = articles[0] if articles else None
    rng.shuffle(articles)
    numbers = _numbers(rng, split, 3)
    account, *others = [_account(rng, number, "") for number in numbers]
    known = others[: rng.choices((0, 1, 2), (75, 20, 5))[0]]
    results: tuple[str, ...] = ()
    if kind == "policy" and target is not None:
        text = _policy_text(rng, target, account.number if rng.random() < 0.25 else None)
        outputs: tuple[str, ...] = (answer(target.text, target.identity),)
    elif kind == "ticket":
        topic = rng.choice(TICKET_TOPICS)
        ticket = f"T-{rng.randrange(200):04d}" if rng.random() < 0.4 else f"T-{_number(rng, split)}"
        text = _ticket_text(rng, account.number, topic)
        outputs = (ticket_call(account.number, topic), ticket_answer(ticket, account.number))
        results = (ticket_record(ticket, account=account.number, topic=topic),)
    else:
        text, final = _field_question(rng, account)
        outputs = (final,) if kind == "record" else (lookup_call(account.number), final)
        results = () if kind == "record" else (account_record(account),)
        if kind == "record":
            known = rng.sample([*known[:1], account], len(known[:1]) + 1)
    return Example(
        tuple((one.identity, one.text) for one in articles),
        tuple(account_record(one) for one in known),
        text,
        outputs,
        results,
        kind,
    )
