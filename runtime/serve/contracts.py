"""Which tools may a model propose, with which arguments, and what may each one change?

The runtime's own word on its tools. What a tool server says about itself is compared with it and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from manifests.canonical import digest
from runtime.effects import SideEffect
from runtime.models.reference.prompt import TICKET_TOPICS
from runtime.serve.envelope import Permission


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContract:
    """One tool as the runtime admits it."""

    name: str
    version: str
    input_schema: dict[str, Any]
    side_effect: SideEffect
    permission: Permission
    """What the caller must have been granted."""
    result_fields: tuple[str, ...]
    """Fields that the result must have, all strings."""

    @property
    def schema_digest(self) -> str:
        """Name the input schema by its content."""
        return digest(self.input_schema)


def _arguments(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_ACCOUNT = {"type": "string", "pattern": "^[0-9]{4}$"}

TOOL_CONTRACTS: Mapping[str, ToolContract] = MappingProxyType(
    {
        contract.name: contract
        for contract in (
            ToolContract(
                name="lookup_account",
                version="1",
                input_schema=_arguments(account=_ACCOUNT),
                side_effect="read",
                permission="read_accounts",
                result_fields=("account", "plan", "status", "balance", "orders"),
            ),
            ToolContract(
                name="create_ticket",
                version="1",
                input_schema=_arguments(account=_ACCOUNT, topic={"type": "string", "enum": list(TICKET_TOPICS)}),
                side_effect="reversible",
                permission="create_tickets",
                result_fields=("ticket", "account", "topic"),
            ),
        )
    }
)
