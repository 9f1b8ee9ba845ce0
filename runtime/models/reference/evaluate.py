"""How often is the reference model right on articles, accounts and subjects that it never saw?

    python -m runtime.models.reference.evaluate --count 1000

Greedy decoding under the output grammar. An output counts only if it equals the expected one byte for byte, so a
right answer in other words is counted wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from runtime.models.reference import prompt, task
from runtime.models.reference.grammar import OutputGrammar
from runtime.models.reference.network import Network, Shape

HERE = Path(__file__).parent
LONGEST_OUTPUT = 64  # tokens; the longest expected output has about 40
ROWS = 64


@dataclass(frozen=True, slots=True)
class Case:
    """One output to get right: the measure it belongs to, the prompt text and the expected text."""

    measure: str
    question: int
    prompt: str
    expected: str


class Writer:
    """Writes outputs greedily under the grammar, many at once, over a key and value cache."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(Shape.read(folder / "config.json"))
        self.network.load_state_dict(load_file(folder / "model.safetensors"))
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.grammar = OutputGrammar(self.tokenizer, prompt.output_schema())
        self.end = self.tokenizer.token_to_id(prompt.END)

    def write(self, prompts: list[str]) -> list[str]:
        """Return one output a prompt, without the end mark; a few at a time, sorted by length to save padding."""
        encoded = [self.tokenizer.encode(one).ids for one in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
        outputs = [""] * len(prompts)
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            for index, tokens in zip(chosen, self._write([encoded[one] for one in chosen]), strict=True):
                outputs[index] = self.tokenizer.decode(tokens)
        return outputs

    @torch.no_grad()
    def _write(self, prompts: list[list[int]]) -> list[list[int]]:
        lengths = torch.tensor([len(one) for one in prompts])
        longest = int(lengths.max())
        cache = self.network.new_cache(rows=len(prompts), positions=longest + LONGEST_OUTPUT)
        rows = torch.arange(len(prompts))
        tokens = torch.tensor([one + [0] * (longest - len(one)) for one in prompts])
        positions = torch.arange(longest).expand(len(prompts), -1)
        scores = self.network.cached(tokens, positions, cache, rows)[rows, lengths - 1]
        matchers = [self.grammar.matcher() for _ in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        active = rows
        for step in range(LONGEST_OUTPUT):
            allowed = torch.from_numpy(self.grammar.allowed([matchers[row] for row in active.tolist()]))
            chosen = scores.masked_fill(~allowed, -math.inf).argmax(-1)
            going = chosen != self.end
            active, chosen = active[going], chosen[going]
            if not len(active):
                break
            for row, token in zip(active.tolist(), chosen.tolist(), strict=True):
                outputs[row].append(token)
                matchers[row].consume_token(token)
            places = (lengths[active] + step)[:, None]
            scores = self.network.cached(chosen[:, None], places, cache, active)[:, 0]
        return outputs


def cases_of(question: int, drawn: task.Example) -> list[Case]:
    """Return the outputs of one example, the final one after the tool's true result."""
    cases: list[Case] = []
    for turn, expected in enumerate(drawn.outputs):
        calls = turn < len(drawn.tool_results)
        turns = list(zip(drawn.outputs[:turn], drawn.tool_results[:turn], strict=True))
        text = prompt.render(
            articles=drawn.articles, account_records=drawn.account_records, question=drawn.question, turns=turns
        )
        cases.append(Case(f"{'tool call' if calls else 'cited answer'}, {drawn.kind}", question, text, expected))
    return cases


def drawn_examples(seed: int, count: int) -> list[task.Example]:
    """Return held-out examples with contexts as training has them: up to four articles in any order."""
    rng = random.Random(f"evaluation {seed}")
    return [task.example(rng, "held_out") for _ in range(count)]


def desk_examples(seed: int, count: int) -> list[task.Example]:
    """Return questions of the desk with the four articles that full-text search finds for them in their tenant."""
    known = {one.number: one for one in task.accounts(seed)}
    articles = {one.identity: one for one in task.corpus(seed)}
    index = sqlite3.connect(":memory:")
    index.execute("CREATE VIRTUAL TABLE article USING fts5(identity UNINDEXED, tenant UNINDEXED, text)")
    index.executemany(
        "INSERT INTO article VALUES (?, ?, ?)", [(a.identity, a.tenant, a.text) for a in articles.values()]
    )
    examples: list[task.Example] = []
    for number, asked in enumerate(task.questions(seed, count)):
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", asked.text))
        query = (
            "SELECT identity FROM article WHERE article MATCH ? AND tenant = ? ORDER BY bm25(article), identity LIMIT 4"
        )
        found = [row[0] for row in index.execute(query, (words, asked.tenant))]
        results: tuple[str, ...] = ()
        outputs = asked.expected
        if asked.kind == "lookup" and asked.account is not None:
            results = (task.account_record(known[asked.account]),)
        elif asked.kind == "ticket" and asked.account is not None:
            ticket = f"T-{number % 10_000:04d}"
            topic = json.loads(outputs[0])["arguments"]["topic"]
            results = (task.ticket_record(ticket, account=asked.account, topic=topic),)
            outputs = tuple(one.replace("{ticket}", ticket) for one in outputs)
        context = tuple((one, articles[one].text) for one in found)
        examples.append(task.Example(context, (), asked.text, outputs, results, asked.kind))
    return examples


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson, 1927)."""
    z = 1.959964
    middle = (right + z * z / 2) / (total + z * z)
    half = z * math.sqrt(right * (total - right) / total + z * z / 4) / (total + z * z)
    return middle - half, middle + half


def score(writer: Writer, examples: list[task.Example]) -> tuple[dict[str, tuple[int, int]], list[tuple[Case, str]]]:
    """Return (right, total) of every measure and of whole questions, and the cases that went wrong."""
    cases = [case for question, drawn in enumerate(examples) for case in cases_of(question, drawn)]
    outputs = writer.write([case.prompt for case in cases])
    totals: Counter[str] = Counter()
    rights: Counter[str] = Counter()
    wrong: list[tuple[Case, str]] = []
    for case, output in zip(cases, outputs, strict=True):
        for measure in (case.measure.split(",")[0], case.measure):
            totals[measure] += 1
            rights[measure] += output == case.expected
        if output != case.expected:
            wrong.append((case, output))
    totals["whole question"] = len(examples)
    rights["whole question"] = len(examples) - len({case.question for case, _ in wrong})
    return {measure: (rights[measure], totals[measure]) for measure in sorted(totals)}, wrong


def main() -> None:
    """Print the measured shares with their intervals."""
    parser = argparse.ArgumentParser(description="Measure the reference model on held-out questions.")
    parser.add_argument("--model", type=Path, default=HERE, help="checkpoint folder")
    parser.add_argument("--count", type=int, default=1000, help="questions in each of the two sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", type=int, default=0, help="how many wrong outputs to show")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    writer = Writer(arguments.model)
    for name, draw in (("drawn contexts", drawn_examples), ("retrieved contexts", desk_examples)):
        shares, wrong = score(writer, draw(arguments.seed, arguments.count))
        print(f"{name}, {arguments.count} held-out questions")
        for measure, (right, total) in shares.items():
            low, high = wilson(right, total)
            print(f"  {measure:24} {right:5} of {total:5}  {right / total:7.2%}  [{low:.2%}, {high:.2%}]")
        for case, output in wrong[: arguments.wrong]:
            print(f"  {case.prompt}\n    expected {case.expected}\n    written  {output}")


if __name__ == "__main__":
    main()
