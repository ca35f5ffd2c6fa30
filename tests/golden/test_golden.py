"""The golden vectors: `rlhf` in single and double precision, and the vectors themselves."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from rlhf.config.ppo import KLSection
from rlhf.modeling.kept_sets import KeptSets, exclude
from rlhf.modeling.logprobs import log_probs_from_logits
from rlhf.modeling.sampling import Sampling, filter_logits
from rlhf.ppo import losses
from tests.golden import reference
from tests.library.toys import DEVICE

pytestmark = pytest.mark.device
FOLDER = Path(__file__).parent
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
DOCUMENTS = {name: json.loads(path.read_text()) for name, path in FILES.items()}
CASES = [
    pytest.param(name, i, id=f"{name}: {case['name']}")
    for name, document in DOCUMENTS.items()
    for i, case in enumerate(document["cases"])
]


class Tensors:
    """A case's inputs: `x.mask` is boolean, other lists have the wanted type, the rest is as is."""

    def __init__(self, inputs, dtype):
        self.inputs, self.dtype = inputs, dtype

    def __getattr__(self, name):
        value = self.inputs[name]
        if name in {"mask", "finished"}:
            return torch.tensor(value, dtype=torch.bool, device=DEVICE)
        if not isinstance(value, list):
            return value
        return torch.tensor(value, dtype=self.dtype, device=DEVICE)


def gae(x):
    advantages, returns = losses.gae(x.rewards, x.values, x.mask, x.gamma, x.gae_lambda)
    return {"advantages": advantages, "returns": returns}


def whitening(x):
    return {"whitened": losses.whiten(x.values, x.mask, x.variance, x.shift_mean)}


def shaped_rewards(x):
    estimate = losses.kl_estimate(x.log_probs, x.reference_log_probs, x.estimator, x.clamp)
    states = losses.value_mask(x.mask, x.max_new_tokens, x.score_position)
    return {"rewards": losses.shaped_rewards(x.scores, estimate, x.mask, states, x.kl_coef)}


def reward_placement(x):
    states = losses.value_mask(x.mask, x.max_new_tokens, x.score_position)
    nothing = torch.zeros_like(x.values[:, :-1])
    rewards = losses.shaped_rewards(x.scores, nothing, x.mask, states, 0.1)
    advantages, _ = losses.gae(rewards, x.values, states, x.gamma, x.gae_lambda)
    return {"states": states, "rewards": rewards, "advantages": advantages[:, :-1] * x.mask}


def ratio_clip(x):
    log_probs = x.log_probs.requires_grad_()
    n = float(x.mask.sum())
    args = (log_probs, x.old_log_probs, x.advantages, x.mask, x.clip_range, n)
    loss, sums = losses.policy_loss(*args, x.inputs.get("dual_clip"))
    loss.backward()
    assert loss.dtype == sums["approx_kl"].dtype == x.dtype
    means = {name: value.item() / n for name, value in sums.items()}
    return {"loss": loss.detach(), "gradient": log_probs.grad, **means}


def dual_clip(x):
    return ratio_clip(x)


def value_clip(x):
    values = x.values.requires_grad_()
    args = (values, x.old_values, x.returns, x.mask, x.value_clip_range, float(x.mask.sum()))
    loss = losses.value_loss(*args)
    loss.backward()
    return {"loss": loss.detach(), "gradient": values.grad}


def kl_estimators(x):
    args = (x.log_probs, x.reference_log_probs)
    return {name: losses.kl_estimate(*args, name, x.clamp) for name in ("k1", "k2", "k3")}


def exact_kl(x):
    return {"kl": losses.exact_kl(x.logits, x.reference_logits)}


def truncated_softmax(x):
    """The filter, the stored sets, and the log-probabilities that replay them."""
    sampling = Sampling(1, x.temperature, x.top_k, x.top_p)
    masks = filter_logits(x.logits, sampling) > -torch.inf
    excluded = KeptSets.of_masks(masks).excluded(0, len(masks))
    chosen = torch.tensor(x.inputs["chosen"], device=DEVICE)
    logits = x.logits.requires_grad_()
    log_probs, entropies = log_probs_from_logits(logits, chosen, x.temperature, True, excluded)
    log_probs.sum().backward()
    reference, _ = log_probs_from_logits(x.reference_logits, chosen, x.temperature, False, excluded)
    scaled = (t.detach() / x.temperature for t in (logits, x.reference_logits))
    return {
        "kept": ~excluded,
        "log_probs": log_probs.detach(),
        "reference_log_probs": reference,
        "entropy": entropies.detach(),
        "kl": losses.exact_kl(*(exclude(t, excluded) for t in scaled)),
        "gradient": logits.grad,
    }


def adaptive_kl(x):
    config = KLSection(
        kl_coef=x.kl_coef, kl_controller=x.controller, kl_target=x.target, kl_horizon=x.horizon
    )
    values = []
    controller = losses.kl_controller(config)
    for current, n in x.inputs["updates"]:
        controller.update(current, n)
        values.append(controller.value)
        state = json.loads(json.dumps(controller.state_dict()))
        controller = losses.kl_controller(config)  # as if the run were resumed
        controller.load_state_dict(state)
    return {"kl_coef": torch.tensor(values, dtype=torch.float64)}


def aggregation(x):
    n = float(x.mask.sum())
    policy, value, entropy, means = [], 0, 0, []
    for rank in x.inputs["parts"]:
        policy.append([])
        for i in rank:
            tokens = (x.log_probs[i], x.old_log_probs[i], x.advantages[i], x.mask[i], x.clip_range)
            policy[-1].append(losses.policy_loss(*tokens, n)[0])
            means.append(losses.policy_loss(*tokens, float(x.mask[i].sum()))[0])
            states = (x.values[i], x.values[i], x.returns[i], x.mask[i])
            value += losses.value_loss(*states, None, n)
            entropy += losses.entropy_bonus(x.entropy[i], x.mask[i], n)
    assert entropy.item() == pytest.approx(losses.masked_mean(x.entropy, x.mask).item())
    return {
        "n_tokens": n,
        "policy": sum(sum(parts) for parts in policy),
        "value": value,
        "entropy": entropy,
        "policy_parts": policy,
        "mean_of_means": sum(means) / len(means),
    }


def missing_eos(x):
    return {"scores": losses.missing_eos(x.scores, x.finished, x.rule, x.penalty)}


def entropy(x):
    entropies = torch.special.entr(x.probabilities).sum(-1)
    bonus = losses.entropy_bonus(entropies, x.mask, float(x.mask.sum()))
    return {"entropy": entropies, "bonus": bonus}


def running_scale(x):
    scale, deviations, scaled = losses.RunningScale(), [], []
    for chunk in x.inputs["chunks"]:
        scores = torch.tensor(chunk, dtype=x.dtype, device=DEVICE)
        scale.update(scores)
        deviations.append(scale.deviation)
        scaled.append(scale.apply(scores))
        state = json.loads(json.dumps(scale.state_dict()))
        scale = losses.RunningScale()
        scale.load_state_dict(state)
    return {"deviations": deviations, "scaled": scaled}


def agree(actual, expected, tolerance, where=""):
    """Fails where two nested lists of numbers differ by more than `tolerance`, relative above 1."""
    if isinstance(expected, list):
        assert len(actual) == len(expected), where
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            agree(*pair, tolerance, f"{where}[{i}]")
    else:
        error = abs(float(actual) - float(expected)) / max(1.0, abs(float(expected)))
        assert error <= tolerance, f"{where}: {float(actual)} instead of {float(expected)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("formula", "number"), CASES)
def test_ours(formula, number, dtype):
    document = DOCUMENTS[formula]
    case = document["cases"][number]
    actual = globals()[formula](Tensors(case["inputs"], dtype))
    tolerance = 1e-5 if dtype == torch.float32 else document["tolerance"]
    for name, expected in case["expected"].items():
        agree(actual[name], expected, tolerance, name)
        if isinstance(actual[name], torch.Tensor) and formula != "adaptive_kl":
            assert actual[name].dtype in (dtype, torch.bool)


@pytest.mark.parametrize(("formula", "number"), CASES)
def test_the_vectors_themselves(formula, number):
    case = json.loads(FILES[formula].read_text(), parse_float=Fraction)["cases"][number]
    again = reference.expected(formula, case["inputs"])
    assert again.keys() == case["expected"].keys()
    for name, expected in case["expected"].items():
        agree(again[name], expected, 1e-12, name)


def case(formula, name):
    return next(c for c in DOCUMENTS[formula]["cases"] if c["name"] == name)


def test_the_values_that_the_convention_names():
    """As written down when the conventions were agreed on; the files may grow, these stay."""
    step = case("gae", "one step")
    assert step["inputs"]["values"] == [[1, 2, 3]]
    assert step["expected"]["advantages"] == [[1, 1, 2]]
    assert round(case("ratio_clip", "the three cases")["expected"]["loss"], 4) == -0.6333
    assert round(case("dual_clip", "the three cases")["expected"]["loss"], 4) == 4.1667
    far = case("kl_estimators", "far above the reference")["expected"]
    assert [round(far[k][0][0], 5) for k in ("k1", "k2", "k3")] == [14, 98, 13]
    assert case("adaptive_kl", "twice the target")["expected"]["kl_coef"] == [0.151536]


def test_every_file_says_what_it_is():
    assert len(FILES) == 15
    assert len(CASES) == sum(len(d["cases"]) for d in DOCUMENTS.values()) >= 70
    for name, document in DOCUMENTS.items():
        assert document.keys() == {"formula", "source", "tolerance", "cases"}, name
        for c in document["cases"]:
            assert c.keys() == {"name", "inputs", "expected", "derivation"}, name
        names = [c["name"] for c in document["cases"]]
        assert len(set(names)) == len(names), name
        assert f"`{name}.json`" in (FOLDER / "README.md").read_text()
