"""Where do articles, accounts and tickets live?  Two SQLite files, built once for a deployment.

Each tenant's articles have a full-text table of their own, so that neither the rows nor the term statistics of one
tenant reach the ranking of another.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Protocol

from manifests.canonical import digest


class ArticleLike(Protocol):
    """What an article must say."""

    @property
    def identity(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def text(self) -> str: ...


class AccountLike(Protocol):
    """What an account must say."""

    @property
    def number(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def plan(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def balance(self) -> int: ...
    @property
    def orders(self) -> int: ...


@contextlib.contextmanager
def opened(path: Path, *, read_only: bool = False) -> Generator[sqlite3.Connection]:
    """Open a SQLite file for one block; commits at its end, closes always."""
    source = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(source, uri=True, timeout=10.0)
    try:
        with connection:
            yield connection
    finally:
        connection.close()


def build_corpus(path: Path, articles: Iterable[ArticleLike]) -> str:
    """Write the article index anew and return the digest of its content."""
    path.unlink(missing_ok=True)
    rows = sorted((article.tenant, article.identity, article.text) for article in articles)
    tenants = sorted({tenant for tenant, _, _ in rows})
    with opened(path) as connection:
        connection.execute("CREATE TABLE tenants (number INTEGER PRIMARY KEY, tenant TEXT NOT NULL UNIQUE)")
        connection.executemany("INSERT INTO tenants VALUES (?, ?)", list(enumerate(tenants)))
        for number, tenant in enumerate(tenants):
            connection.execute(
                f"CREATE VIRTUAL TABLE articles_{number} USING fts5"
                "(article UNINDEXED, tenant UNINDEXED, body, tokenize='porter unicode61')"
            )
            connection.executemany(
                f"INSERT INTO articles_{number} VALUES (?, ?, ?)",
                [(identity, owner, text) for owner, identity, text in rows if owner == tenant],
            )
    return corpus_digest(path)


def corpus_digest(path: Path) -> str:
    """Name an article index by its rows, whatever its file's bytes."""
    with opened(path, read_only=True) as connection:
        numbers = [number for (number,) in connection.execute("SELECT number FROM tenants ORDER BY number")]
        rows = [
            list(row)
            for number in numbers
            for row in connection.execute(f"SELECT tenant, article, body FROM articles_{number} ORDER BY rowid")
        ]
    return digest(rows)


def build_crm(path: Path, accounts: Iterable[AccountLike]) -> None:
    """Write accounts anew and an empty ticket table."""
    path.unlink(missing_ok=True)
    with opened(path) as connection:
        connection.execute(
            "CREATE TABLE accounts (number TEXT PRIMARY KEY, tenant TEXT NOT NULL, plan TEXT NOT NULL,"
            " status TEXT NOT NULL, balance INTEGER NOT NULL, orders INTEGER NOT NULL) STRICT"
        )
        connection.execute(
            "CREATE TABLE tickets (number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, account TEXT NOT NULL,"
            " topic TEXT NOT NULL, idempotency_key TEXT NOT NULL, UNIQUE (tenant, idempotency_key)) STRICT"
        )
        connection.executemany(
            "INSERT INTO accounts VALUES (?, ?, ?, ?, ?, ?)",
            [(one.number, one.tenant, one.plan, one.status, one.balance, one.orders) for one in accounts],
        )
