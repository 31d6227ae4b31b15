"""The policy may ask a calculator before it answers.

    rl:
      prompts: sums.jsonl  # {"messages": [{"role": "user", "content": "12*7?"}], "answer": "84"}
      rollout: calculator.py:play

It asks by writing <calc>12 * 7</calc>. What the calculator says is read and not trained.
"""

import ast
import operator
import re

MOST_TURNS = 4
CALL = re.compile(r"<calc>(.{1,80}?)</calc>", re.DOTALL)
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.USub: operator.neg,
}


def parse_call(text):
    """Return what the policy asks the calculator, or None."""
    found = CALL.search(text)
    return found and found[1]


def calculate(text):
    """Return a sum's value as text; never `eval` what a model writes."""

    def value(node):
        match node:
            case ast.Constant(value=int() as number) if abs(number) < 10**9:
                return number
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(operand))
        raise ValueError("not a sum")

    try:
        return str(value(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError):
        return "error"


async def play(client, row):
    """Play one rollout; what is returned is the reward."""
    turn = await client.sample(row["prompt"])
    while (call := parse_call(turn.text)) and client.num_turns < MOST_TURNS:
        turn = await client.sample(client.extend(role="tool", content=calculate(call)))
    return float(turn.text.strip() == row["answer"])
