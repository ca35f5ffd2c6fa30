"""The test session's own checks: types and shapes of calls into `rlhf` are really looked at."""

import pytest
import torch

from rlhf.config.watchdog import WatchdogConfig
from rlhf.data.rows import Pair, messages_of
from rlhf.ppo.frontier import kl_above_budget
from rlhf.ppo.losses import masked_mean
from tests.conftest import CHECKS_SHAPES

pytestmark = pytest.mark.skipif(not CHECKS_SHAPES, reason="RLHF_CHECK_SHAPES=0")


def test_types_are_checked_by_beartype_alone_where_no_shape_is_named():
    with pytest.raises(TypeError, match="violates type hint"):
        messages_of(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="violates type hint"):
        kl_above_budget(3, WatchdogConfig(), 1)  # pyright: ignore[reportArgumentType]


def test_fields_of_dataclasses_are_checked():
    with pytest.raises(TypeError, match="violates type hint"):
        Pair([], "good", 3)  # pyright: ignore[reportArgumentType]


def test_shapes_must_agree():
    masked_mean(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask"):
        masked_mean(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))
