"""The routing table: whose rows are whose, and where each piece stands in its random stream."""

import pytest
import torch

from manylora.lora.adapter import Adapter, SiteIndex
from manylora.lora.init import fresh_state
from manylora.lora.layout import plan_layout
from manylora.lora.routing import RoutingTable, Segment, current_table, routing
from manylora.lora.sites import Site, resolve_targets
from manylora.types import AdapterSpec

SITES = (Site("q_proj", 4, 4, 0), Site("k_proj", 4, 4, 0), Site("o_proj", 4, 4, 1))


def adapter(seed: int = 0, targets: tuple[str, ...] = ("q_proj", "o_proj"), dropout: float = 0.0):
    spec = AdapterSpec(rank=2, targets=targets, dropout=dropout, seed=seed)
    layout = plan_layout(spec, resolve_targets(spec, SITES))
    return Adapter(fresh_state(spec, layout), SiteIndex(SITES), torch.device("cpu")).weights


def test_only_adapters_on_the_group_have_work():
    one, two = adapter(), adapter(targets=("o_proj",))
    table = RoutingTable(
        [Segment(3, one), Segment(2, None), Segment(4, two), Segment(0, one)], training=True
    )
    assert table.sizes == [3, 2, 4, 0]
    assert [item.segment for item in table.work(0)] == [0]
    assert [item.segment for item in table.work(1)] == [0, 2]
    assert table.work(1)[1].block is two.blocks[1]
    assert table.work(7) == []
    assert table.work(1) is table.work(1)  # worked out once


def test_a_part_of_a_segment_is_a_segment_by_itself():
    one, two = adapter(), adapter(seed=1)
    table = RoutingTable([Segment(3, one), Segment(2, None), Segment(4, two)], training=True)
    (item,) = table.part(2, 1, 0)
    assert (item.segment, item.block) == (0, two.blocks[0])
    assert table.part(1, 0, 0) == []


def seeds(table: RoutingTable, group: int = 0) -> list[int]:
    return [item.seed for item in table.work(group)]


def test_random_streams_are_an_adapters_own():
    """The seed depends on adapter, draw and group, and neither on place nor on neighbours."""
    one, two = adapter(seed=1, dropout=0.5), adapter(seed=2, dropout=0.5)
    alone = RoutingTable([Segment(3, one, draw=4)], training=True)
    beside = RoutingTable([Segment(9, two, draw=4), Segment(3, one, draw=4)], training=True)
    assert seeds(alone)[0] == seeds(beside)[1] != seeds(beside)[0]
    later = RoutingTable([Segment(3, one, draw=5)], training=True)
    assert len({seeds(alone)[0], seeds(later)[0], seeds(alone, 1)[0]}) == 3
    # Within a piece that is cut further, each part has a mask of its own.
    parts = [alone.part(0, within, 0)[0].seed for within in (0, 2)]
    beside_parts = [beside.part(1, within, 0)[0].seed for within in (0, 2)]
    assert parts == beside_parts
    assert parts[0] != parts[1]


def test_no_dropout_outside_training():
    one = adapter(dropout=0.5)
    (item,) = RoutingTable([Segment(3, one)], training=False).work(0)
    assert (item.dropout, item.seed) == (0.0, 0)
    (item,) = RoutingTable([Segment(3, one)], training=True).work(0)
    assert item.dropout == 0.5


def test_one_table_at_a_time_and_none_after_an_error():
    table = RoutingTable([Segment(1, None)], training=False)
    with pytest.raises(RuntimeError, match="inside"), routing(table):
        assert current_table() is table
        table.pending[0] = (torch.zeros(1), {})
        with pytest.raises(AssertionError, match="already running"), routing(table):
            pass
        raise RuntimeError("inside")
    assert current_table() is None
    assert table.pending == {}
