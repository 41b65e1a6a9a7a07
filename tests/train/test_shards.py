from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ranks import Found, run_ranks

from cliplet.train.shards import (
    log_sum_exp_over_ranks,
    place,
    row_counts,
    rows_of_all,
    shard_range,
    times_world,
    whole_on_first,
)

# What processes 0, 1 and 2 put in; see `ranks.collectives`.
ROWS = [[0.0], [10.0], [11.0], [20.0], [21.0], [22.0]]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(folder, "shards", [3])
    return [dict(np.load(folder / "3" / f"collectives_{rank}.npz")) for rank in range(3)]


def test_every_process_has_the_rows_of_all(three: list[Found]) -> None:
    assert [found["rows"].tolist() for found in three] == [ROWS] * 3


def test_gradient_of_own_rows_is_what_all_want_of_them(three: list[Found]) -> None:
    # The processes weigh all rows with 1, 2 and 3.
    assert [found["rows gradient"].tolist() for found in three] == [[[6.0]] * n for n in (1, 2, 3)]


def test_sum_is_one_number_and_its_derivative_is_counted_once(three: list[Found]) -> None:
    share = math.log(sum(math.exp(-n) for n in range(3)))
    for rank, found in enumerate(three):
        assert found["sum"].tolist() == pytest.approx([1002 + share, -1000 + share, -1e30])
        expected = [math.exp(rank - 2 - share), math.exp(-rank - share)]
        assert found["sum gradient"][:2].tolist() == pytest.approx(expected, rel=1e-4)
        assert np.isfinite(found["sum gradient"]).all()


def test_first_process_gets_the_whole_matrix(three: list[Found]) -> None:
    assert three[0]["whole"].tolist() == ROWS
    assert [found["whole"].size for found in three[1:]] == [0, 0]


@pytest.mark.parametrize(("rows", "world"), [(10, 1), (10, 3), (11, 3), (12, 3), (3, 3), (1_000_001, 8)])
def test_shards_follow_each_other_and_differ_by_one_row_at_most(rows: int, world: int) -> None:
    shards = [shard_range(rows, rank, world) for rank in range(world)]
    assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
    assert shards[-1].stop == rows
    assert {len(shard) for shard in shards} <= {rows // world, -(-rows // world)}


def test_one_process_by_itself_is_a_world_of_one() -> None:
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    assert place() == (0, 1)
    assert row_counts(rows) == [3]
    assert rows_of_all(rows, [3]) is rows
    assert log_sum_exp_over_ranks(rows) is rows
    assert times_world(rows) is rows
    whole = whole_on_first(rows)
    assert whole is not None and whole.equal(rows) and not whole.requires_grad
