"""Clusters from attributes, trees and tables, against small cases worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raycon.index import metadata


def partition(label: np.ndarray) -> list[list[int]]:
    return sorted(np.flatnonzero(label == value).tolist() for value in np.unique(label))


def test_attributes_of_highest_entropy_are_kept() -> None:
    #                  constant, even, one in four, even again
    table = np.array([[1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 0]])
    assert metadata.entropy(table[:, 0]) == 0
    assert metadata.entropy(table[:, 1]) == pytest.approx(1)
    assert metadata.entropy(table[:, 2]) == pytest.approx(2 - 0.75 * np.log2(3))
    assert partition(metadata.attribute_clusters(table, 1)) == [[0, 1], [2, 3]]  # of two even ones the earlier
    assert partition(metadata.attribute_clusters(table, 2)) == [[0], [1], [2], [3]]
    with pytest.raises(ValueError, match=r"5 of 4 attributes: give 1 \.\. 4"):
        metadata.attribute_clusters(table, 5)


def test_finer_levels_refine_coarser_ones() -> None:
    table = (np.random.default_rng(0).random((500, 12)) < np.linspace(0.05, 0.5, 12)).astype(int)
    coarse = metadata.attribute_clusters(table, 1)
    for number in range(2, 13):
        fine = metadata.attribute_clusters(table, number)
        assert len(np.unique(metadata.dense(fine, coarse))) == len(np.unique(fine)) <= 2**number
        assert sorted(np.unique(fine)) == list(range(len(np.unique(fine))))
        coarse = fine


def test_a_tree_is_cut_at_a_depth() -> None:
    paths = np.array(
        [
            ["animal", "dog", "poodle"],
            ["animal", "dog", "beagle"],
            ["animal", "cat", ""],  # a class above the deepest cut stays one of its own
            ["thing", "cat", ""],  # the same name below another node is another node
            ["animal", "dog", "poodle"],
        ]
    )
    assert partition(metadata.hierarchy_clusters(paths, 1)) == [[0, 1, 2, 4], [3]]
    assert partition(metadata.hierarchy_clusters(paths, 2)) == [[0, 1, 4], [2], [3]]
    assert partition(metadata.hierarchy_clusters(paths, 3)) == [[0, 4], [1], [2], [3]]
    with pytest.raises(ValueError, match="level 4 of a tree of 3 levels"):
        metadata.hierarchy_clusters(paths, 4)


def test_a_published_table(tmp_path: Path) -> None:
    """With an index column, and a last line of index -1 that counts the distinct values."""
    file = tmp_path / "meta.csv"
    file.write_text(
        ",path,class,label_gran_3\n0,a/1.jpg,1,7\n1,a/2.jpg,1,5\n2,b/1.jpg,2,7\n-1,num_per_label_gran,2,2\n",
        encoding="utf-8",
    )

    def clusters(kind: str, columns: tuple[str, ...], granularity: int = 1, rows: int = 3) -> list[list[int]]:
        return partition(metadata.table_clusters(file, kind, columns, granularity, rows))

    assert clusters("column", ("label_gran_3",)) == [[0, 2], [1]]
    assert clusters("attributes", ("class", "label_gran_3"), 2) == [[0], [1], [2]]
    assert clusters("hierarchy", ("class", "label_gran_3"), 1) == [[0, 1], [2]]
    with pytest.raises(ValueError, match="has 3 lines, the data 4 images"):
        clusters("column", ("class",), rows=4)
    with pytest.raises(ValueError, match="no column 'gran'; it has path, class, label_gran_3"):
        clusters("column", ("gran",))
    with pytest.raises(ValueError, match=r"3 columns of .*: name the one"):
        clusters("column", ())
    file.write_text("a,b\n1,2\n3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3 has not the 2 columns"):
        clusters("column", ("a",))
    with pytest.raises(ValueError, match="not a table that can be read"):
        metadata.read_table(tmp_path / "absent.csv")
