"""The tables against the definition, and the inverse against the forward."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings, strategies as st

import nbhd
from nbhd import geometry
from nbhd.geometry import axis_table
from tests.truth import keys_of


@st.composite
def axes(draw):
    k, d = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    return draw(st.integers(k * d, k * d + 20)), k, draw(st.integers(1, k)), d, draw(st.booleans())


@settings(max_examples=400, deadline=None)
@given(axes())
def test_tables_hold_the_keys_of_the_definition(axis):
    length, k, s, d, causal = axis
    table = axis_table(*axis)
    for i in range(length):
        seen = [int(table.first[i]) + j * d for j in range(int(table.count[i]))]
        assert seen == [key for key in keys_of(i, length, k, s, d, causal) if key is not None]
        assert i in seen


@settings(max_examples=400, deadline=None)
@given(axes())
def test_inverse_table_is_the_transpose(axis):
    length, d = axis[0], axis[3]
    table = axis_table(*axis)
    forward = {(i, int(table.first[i]) + j * d) for i in range(length) for j in range(int(table.count[i]))}
    inverse = {
        (int(table.first_query[key]) + j * d, key) for key in range(length) for j in range(int(table.query_count[key]))
    }
    assert forward == inverse


@pytest.mark.parametrize(
    ("axis", "expected"),
    [  # published examples of the windows of 8 positions
        ((8, 3, 1, 1, False), "0-2 0-2 1-3 2-4 3-5 4-6 5-7 5-7"),
        ((8, 4, 1, 1, False), "0-3 0-3 0-3 1-4 2-5 3-6 4-7 4-7"),
        ((8, 3, 3, 1, False), "0-2 0-2 0-2 3-5 3-5 3-5 5-7 5-7"),
        ((8, 4, 2, 1, False), "0-3 0-3 1-4 1-4 3-6 3-6 4-7 4-7"),
        ((8, 3, 1, 1, True), "0-0 0-1 0-2 1-3 2-4 3-5 4-6 5-7"),
        ((8, 4, 3, 1, True), "0-0 0-1 0-2 2-3 2-4 2-5 4-6 4-7"),
        ((7, 3, 1, 2, False), "0-4 1-5 0-4 1-5 2-6 1-5 2-6"),
        ((9, 3, 2, 2, True), "0-0 1-1 0-2 1-3 2-4 3-5 2-6 3-7 4-8"),
    ],
)
def test_windows_of_known_examples(axis, expected):
    table = axis_table(*axis)
    last = table.first + (table.count - 1) * table.dilation
    assert " ".join(f"{a}-{b}" for a, b in zip(table.first.tolist(), last.tolist(), strict=True)) == expected


def test_only_a_causal_axis_has_windows_that_are_not_full():
    assert (axis_table(9, 4, 2, 2, False).count == 4).all()
    assert (axis_table(9, 4, 2, 2, True).count < 4).any()


def test_tables_of_ever_new_lengths_are_forgotten(monkeypatch):
    """A server sees sequences of every length."""
    monkeypatch.setattr(geometry, "MOST_BYTES", 1 << 20)
    made = []
    for length in range(4000, 4100):
        tokens = torch.zeros(1, length, 1, 1)
        nbhd.na1d(tokens, tokens, tokens, 3)
        made.append(weakref.ref(axis_table(length, 3, 1, 1, False)))
    alive = [table() for table in made if table() is not None]
    assert alive
    assert sum(4 * 8 * table.length for table in alive) <= 1 << 20
