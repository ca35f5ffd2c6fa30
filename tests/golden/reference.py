"""Reference of the golden values: exact fractions, and logarithms to 50 digits.

Written in plain Python from the text in the JSON files, by other formulas than `rlhf.ppo` where
possible: sums instead of recursions, cases instead of minima, pairs instead of deviations.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import combinations

DIGITS = 50


def real(x):
    return Decimal(x.numerator) / Decimal(x.denominator) if isinstance(x, Fraction) else Decimal(x)


def exp(x):
    return Fraction(real(x).exp())


def ln(x):
    return Fraction(real(x).ln())


def root(x):
    return Fraction(real(x).sqrt())


def clip(x, bound):
    return x if bound is None or abs(x) <= bound else bound if x > 0 else -bound


def places(mask):
    return [(i, t) for i, row in enumerate(mask) for t, valid in enumerate(row) if valid]


def table(mask, entries):
    return [[entries.get((i, t), 0) for t in range(len(row))] for i, row in enumerate(mask)]


def gae(rewards, values, mask, gamma, gae_lambda):
    """Sum all later errors for each token, in O(T²)."""
    valid = places(mask)
    following = {(i, t): values[i][t + 1] if (i, t + 1) in valid else 0 for i, t in valid}
    delta = {(i, t): rewards[i][t] + gamma * following[i, t] - values[i][t] for i, t in valid}
    decay = gamma * gae_lambda
    sums = {
        (i, t): sum(decay ** (s - t) * delta[i, s] for j, s in valid if j == i and s >= t)
        for i, t in valid
    }
    returns = {(i, t): a + values[i][t] for (i, t), a in sums.items()}
    return {"advantages": table(mask, sums), "returns": table(mask, returns)}


def whitening(values, mask, variance, shift_mean):
    """Σ over pairs of (x − y)² is n times the sum of squared deviations."""
    valid = {(i, t): Fraction(values[i][t]) for i, t in places(mask)}
    n = len(valid)
    mean = sum(valid.values()) / n
    squares = sum((x - y) ** 2 for x, y in combinations(valid.values(), 2)) / n
    if squares == 0:
        scaled = dict.fromkeys(valid, Fraction(0))
    else:
        deviation = root(squares / (n if variance == "biased" else n - 1))
        scaled = {k: (x - mean) / deviation for k, x in valid.items()}
    return {
        "whitened": table(mask, {k: x + (0 if shift_mean else mean) for k, x in scaled.items()})
    }


def estimates(log_prob, reference, clamp):
    d = log_prob - reference
    return {
        "k1": clip(d, clamp),
        "k2": clip(d * d / 2, clamp),
        "k3": clip(exp(reference) / exp(log_prob) - 1 + d, clamp),
    }


def kl_estimators(log_probs, reference_log_probs, clamp):
    rows = [
        [estimates(a, b, clamp) for a, b in zip(*pair, strict=True)]
        for pair in zip(log_probs, reference_log_probs, strict=True)
    ]
    return {k: [[token[k] for token in row] for row in rows] for k in ("k1", "k2", "k3")}


def exact_kl(logits, reference_logits):
    def softmax(row):
        weights = [exp(x) for x in row]
        return [w / sum(weights) for w in weights]

    pairs = zip(map(softmax, logits), map(softmax, reference_logits), strict=True)
    return {"kl": [sum(p * ln(p / q) for p, q in zip(*pair, strict=True)) for pair in pairs]}


def truncated_softmax(logits, reference_logits, temperature, top_k, top_p, chosen):
    """Filter by counting likelier tokens; no logarithm of a sum."""
    result = {name: [] for name in ("kept", "log_probs", "reference_log_probs", "entropy", "kl")}
    result["gradient"] = []
    for row, other, token in zip(logits, reference_logits, chosen, strict=True):
        weights = [exp(Fraction(x) / Fraction(temperature)) for x in row]
        rivals = [exp(Fraction(x) / Fraction(temperature)) for x in other]
        tokens = range(len(row))
        above = {i: [j for j in tokens if row[j] > row[i]] for i in tokens}
        kept = [i for i in tokens if not 0 < top_k <= len(above[i])]
        total = sum(weights[i] for i in kept)
        if top_p < 1:
            kept = [i for i in kept if sum(weights[j] for j in above[i]) < top_p * total]
        p = {i: weights[i] / sum(weights[j] for j in kept) for i in kept}
        q = {i: rivals[i] / sum(rivals[j] for j in kept) for i in kept}
        result["kept"].append([int(i in kept) for i in tokens])
        result["log_probs"].append(ln(p[token]))
        result["reference_log_probs"].append(ln(q[token]))
        result["entropy"].append(-sum(x * ln(x) for x in p.values()))
        result["kl"].append(sum(p[i] * ln(p[i] / q[i]) for i in kept))
        result["gradient"].append(
            [((i == token) - p.get(i, 0)) / Fraction(temperature) for i in tokens]
        )
    return result


def states_of(mask, score_position, max_new_tokens):
    states = []
    for row in mask:
        length = sum(row)
        more = score_position == "past_end" and length < max_new_tokens
        states.append([int(t < length + more) for t in range(len(row) + 1)])
    return states


def shaped_rewards(
    scores, log_probs, reference_log_probs, mask, kl_coef, estimator, clamp, score_position,
    max_new_tokens,
):  # fmt: skip
    states = states_of(mask, score_position, max_new_tokens)
    rewards = []
    for i, score in enumerate(scores):
        row = [0] * (len(mask[i]) + 1)
        for t, valid in enumerate(mask[i]):
            if valid:
                pair = log_probs[i][t], reference_log_probs[i][t]
                row[t] = -kl_coef * estimates(*pair, clamp)[estimator]
        row[sum(states[i]) - 1] += score
        rewards.append(row)
    return {"rewards": rewards}


def reward_placement(scores, values, mask, score_position, max_new_tokens, gamma, gae_lambda):
    states = states_of(mask, score_position, max_new_tokens)
    rewards = [
        [score if t == sum(row) - 1 else 0 for t in range(len(row))]
        for score, row in zip(scores, states, strict=True)
    ]
    advantages = gae(rewards, values, states, gamma, gae_lambda)["advantages"]
    of_tokens = {(i, t): advantages[i][t] for i, t in places(mask)}
    return {"states": states, "rewards": rewards, "advantages": table(mask, of_tokens)}


def surrogate(ratio, advantage, eps, dual=None):
    """Return a token's loss, its gradient by the log-prob, and whether it was clipped."""
    if advantage >= 0 and ratio > 1 + eps:
        return -(1 + eps) * advantage, 0, True
    if advantage < 0 and ratio < 1 - eps:
        return -(1 - eps) * advantage, 0, True
    if advantage < 0 and dual is not None and ratio > dual:
        return -dual * advantage, 0, False
    return -ratio * advantage, -ratio * advantage, False


def surrogates(log_probs, old_log_probs, advantages, mask, clip_range, dual_clip=None):
    valid = places(mask)
    ratio = {(i, t): exp(log_probs[i][t]) / exp(old_log_probs[i][t]) for i, t in valid}
    terms = {
        (i, t): surrogate(r, advantages[i][t], clip_range, dual_clip) for (i, t), r in ratio.items()
    }
    return ratio, terms


def ratio_clip(**inputs):
    inputs.pop("ratios")
    ratio, terms = surrogates(**inputs)
    n = len(terms)
    return {
        "loss": sum(t[0] for t in terms.values()) / n,
        "gradient": table(inputs["mask"], {k: t[1] / n for k, t in terms.items()}),
        "clip_fraction": Fraction(sum(t[2] for t in terms.values()), n),
        "approx_kl": sum(r - 1 - ln(r) for r in ratio.values()) / n,
    }


def dual_clip(**inputs):
    return {k: v for k, v in ratio_clip(**inputs).items() if k in {"loss", "gradient"}}


def value_clip(values, old_values, returns, mask, value_clip_range):
    losses, gradients = {}, {}
    for i, t in places(mask):
        value, target = values[i][t], returns[i][t]
        clamped = old_values[i][t] + clip(value - old_values[i][t], value_clip_range)
        decides = abs(clamped - target) > abs(value - target)
        losses[i, t] = Fraction(((clamped if decides else value) - target) ** 2) / 2
        gradients[i, t] = Fraction(0 if decides else value - target)
    n = len(losses)
    return {
        "loss": sum(losses.values()) / n,
        "gradient": table(mask, {k: g / n for k, g in gradients.items()}),
    }


def adaptive_kl(kl_coef, controller, target, horizon, updates):
    values = []
    for kl, n in updates:
        if controller == "adaptive":
            if kl > target * Fraction(6, 5):
                error = Fraction(1, 5)
            elif kl < target * Fraction(4, 5):
                error = Fraction(-1, 5)
            else:
                error = Fraction(kl - target) / target
            kl_coef = kl_coef + kl_coef * error * n / horizon
        values.append(kl_coef)
    return {"kl_coef": values}


def aggregation(
    log_probs, old_log_probs, advantages, values, returns, entropy, mask, clip_range, parts
):
    _, terms = surrogates(log_probs, old_log_probs, advantages, mask, clip_range)
    n = len(terms)

    def loss(rows):
        return sum((term[0] for (i, _), term in terms.items() if i in rows), Fraction(0))

    means = [loss(rows) / sum(sum(mask[i]) for i in rows) for rank in parts for rows in rank]
    squares = [Fraction((values[i][t] - returns[i][t]) ** 2) for i, t in terms]
    return {
        "n_tokens": n,
        "policy": loss(range(len(mask))) / n,
        "value": sum(squares) / 2 / n,
        "entropy": sum(Fraction(entropy[i][t]) for i, t in terms) / n,
        "policy_parts": [[loss(rows) / n for rows in rank] for rank in parts],
        "mean_of_means": sum(means) / len(means),
    }


def missing_eos(scores, finished, rule, penalty):
    if penalty is None or rule == "none":
        return {"scores": scores}
    kept = 1 if rule == "subtract" else 0
    pairs = zip(scores, finished, strict=True)
    return {"scores": [score if ended else kept * score - penalty for score, ended in pairs]}


def entropy(probabilities, mask):
    rows = [[-sum(p * ln(p) for p in token if p) for token in row] for row in probabilities]
    valid = [rows[i][t] for i, t in places(mask)]
    return {"entropy": rows, "bonus": sum(valid) / len(valid)}


def running_scale(chunks):
    seen, deviations, scaled = [], [], []
    for chunk in chunks:
        seen += [Fraction(x) for x in chunk]
        n = len(seen)
        squares = sum((x - y) ** 2 for x, y in combinations(seen, 2)) / n
        deviations.append(root(squares / (n - 1)) if squares else Fraction(1))
        scaled.append([x / deviations[-1] for x in chunk])
    return {"deviations": deviations, "scaled": scaled}


def expected(formula, inputs):
    """Return the values of `formula` (a JSON file's name) for the inputs of a case."""
    with localcontext(prec=DIGITS):
        return globals()[formula](**inputs)
