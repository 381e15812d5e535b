"""Packing samples into rows: which samples share a row, decided from lengths alone."""

import numpy as np


def pack(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Put samples into as few rows as best-fit-decreasing needs.

    Args:
        lengths: ``[samples]`` in tokens, none above ``row_length``.
        row_length: capacity of a row, in tokens.

    Returns:
        For each row the indices into ``lengths`` of its samples. A function of its arguments only.

    Rows are kept in buckets by the room that is left; a bit set of non-empty buckets finds the tightest fit at once.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    non_empty = 0
    order = np.argsort(-lengths, kind="stable")
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = non_empty >> length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + length
            row = by_room[room].pop()
            if not by_room[room]:
                non_empty &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(sample)
        by_room[room - length].append(row)
        non_empty |= 1 << (room - length)
    return rows
