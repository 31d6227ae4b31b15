"""The policy guesses a number between 1 and 100, and is told whether it is higher or lower.

    rl:
      prompts: games.jsonl       # {"prompt": "Guess my number, 1 to 100.\\n"}, as many as you like
      rollout: guessing.py:play

The number is drawn from the rollout's own seed, so that a run can be repeated.
"""

import random
import re

from manylora import RolloutResult

MOST_GUESSES = 7


async def play(client, row):
    """Play one game; the earlier it is won, the more it is worth."""
    secret = random.Random(client.seed).randint(1, 100)
    prompt, near = row["prompt"], 0.0
    for guesses in range(1, MOST_GUESSES + 1):
        turn = await client.sample(prompt, max_tokens=8, stop_strings=["\n"])
        found = re.search(r"\d{1,3}", turn.text)
        guess = int(found[0]) if found else None
        if guess == secret:
            won = 1 - (guesses - 1) / (2 * MOST_GUESSES)
            return RolloutResult(
                reward=won, parts={"won": won, "near": None}, metrics={"guesses": guesses}
            )
        if guess is not None:
            near = max(near, 0.2 * (1 - min(abs(guess - secret), 100) / 100))
        said = "not a number" if guess is None else "higher" if guess < secret else "lower"
        prompt = client.extend(f"{said}\n")
    return RolloutResult(
        reward=near, parts={"won": 0.0, "near": near}, metrics={"guesses": MOST_GUESSES}
    )
