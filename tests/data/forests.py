"""Made-up examples whose beginnings are shared."""

import numpy as np

from steerjax.data.trees import Example


def example(number, tokens, root=1, targets=None, weights=None, unit=None, objective="a"):
    """`targets`: place -> what is learnt there."""
    targets = targets or {}
    places = np.array(sorted(targets), np.int32)
    learnt = np.array([targets[place] for place in sorted(targets)], np.int32)
    weights = np.ones(len(places), np.float32) if weights is None else np.array(weights, np.float32)
    return Example(objective, number, np.array(tokens, np.int32), root, places, learnt, weights, unit)


def random_examples(seed, count=30, depth=5, units=0.0):
    """Examples of two objectives that go on from places inside earlier ones, from a vocabulary of three.

    `units`: the share of those that stay with another one.
    """
    random = np.random.default_rng(seed)
    texts: list[tuple[np.ndarray, int]] = []
    examples: list[Example] = []
    for number in range(count):
        earlier = [text for text in texts if text[1] < depth]
        base, level = earlier[random.integers(len(earlier))] if earlier and random.random() < 0.8 else (np.zeros(0), 0)
        tokens = np.concatenate([base[: random.integers(len(base) + 1)], random.integers(1, 4, random.integers(2, 7))])
        texts.append((tokens, level + 1))
        targets = {place: int(random.integers(0, 4)) for place in range(len(tokens)) if random.random() < 0.4}
        unit = number // 3 if random.random() < units else None
        weights = random.integers(1, 4, len(targets))
        examples.append(example(number, tokens, 2, targets, weights, unit, "ab"[number % 2]))
    return examples


def prompts(responses, seed=0, longest=12):
    """Prompts with so many responses each, one target at each end."""
    random = np.random.default_rng(seed)
    draw = lambda: random.integers(1, 1000, random.integers(3, longest)).tolist()  # noqa: E731
    examples = []
    for number, count in enumerate(responses):
        prompt = [1000 + number, *draw()]
        for _ in range(count):
            tokens = prompt + draw()
            examples.append(example(len(examples), tokens, len(prompt), {len(tokens) - 1: 0}))
    return examples
