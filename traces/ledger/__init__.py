"""Where events are kept: outbox, sealed segments and their DuckDB projection."""
