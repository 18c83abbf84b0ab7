"""python -m raycon.index: build, search, cluster, stats, plan, on files of every kind, right and wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raycon.index.__main__ import main

ROWS, DIM = 700, 12


def features(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def parquet(file: Path, **columns: object) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), file, row_group_size=100)
    return file


def done(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 2) -> str:
    assert main([str(a) for a in arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.fixture
def table(tmp_path: Path) -> Path:
    np.save(tmp_path / "features.npy", features())
    return tmp_path / "features.npy"


def test_build_writes_what_search_cluster_and_stats_read(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, index = unit(features()), tmp_path / "index"
    assert "700 x 12 features, cosine, float32" in done(capsys, "build", table, "--out", index, "--shards", 3)
    assert sorted(p.name for p in index.iterdir()) == [
        name for rows in ("0-233", "233-466", "466-700") for name in (f"rows-{rows}.json", f"rows-{rows}.v0.npy")
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.npy", "index"]
    queries = features(9, seed=1)
    np.save(tmp_path / "queries.npy", queries)
    truth = unit(queries) @ x.T
    order = np.argsort(-truth, axis=1)[:, :4]
    for source in (index, table):  # an index, or the features themselves
        out = tmp_path / f"{source.name}.npz"
        done(capsys, "search", source, "--queries", tmp_path / "queries.npy", "-k", 4, "--out", out)
        found = np.load(out, allow_pickle=False)
        np.testing.assert_array_equal(found["rows"], order)
        np.testing.assert_allclose(found["similarity"], np.take_along_axis(truth, order, 1), atol=1e-6)
    lines = done(capsys, "search", index, "--rows", 5, 699, "-k", 2).splitlines()
    own = x[[5, 699]] @ x.T
    own[[0, 1], [5, 699]] = -2
    best = np.argsort(-own, axis=1)[:, :2]
    assert lines[0].split("  ")[0] == f"row 5: {best[0, 0]} ({own[0, best[0, 0]]:.4f})"
    assert lines[1].startswith(f"row 699: {best[1, 0]} (")


def test_clusters_are_those_of_lloyd(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, out = unit(features()), tmp_path / "clusters.npz"
    text = done(capsys, "cluster", table, "-k", 5, 30, "--out", out, "--iterations", 60, "--redo", 2)
    found = np.load(out, allow_pickle=False)
    for k in (5, 30):
        label, centroids = found[f"assignment_{k}"], found[f"centroids_{k}"]
        means = np.stack([x[label == c].mean(0) for c in range(k)])
        np.testing.assert_allclose(centroids, means, atol=1e-6)
        sqdist = ((x[:, None] - means) ** 2).sum(-1)
        assert (sqdist.argmin(1) == label).mean() > 0.98  # a fixed point of Lloyd, or nearly
        (line,) = (line for line in text.splitlines() if line.startswith(f"k {k}:"))
        assert float(line.split("objective ")[1].split()[0]) == pytest.approx(sqdist.min(1).sum(), rel=2e-3)
    again = done(capsys, "cluster", table, "-k", 5, 30, "--warm", out)
    assert all(float(line.rsplit(" ", 1)[1]) > 0.97 for line in again.splitlines() if line.startswith("k "))
    assert "passes 2 " in again or "passes 1 " in again


def test_l2_keeps_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = features() * np.linspace(1, 9, ROWS, dtype=np.float32)[:, None]
    x[3] = 0
    np.save(tmp_path / "x.npy", x)
    done(capsys, "build", tmp_path / "x.npy", "--out", tmp_path / "index", "--metric", "l2")
    done(capsys, "search", tmp_path / "index", "--rows", 3, "-k", 5, "--out", tmp_path / "near.npz")
    found = np.load(tmp_path / "near.npz")
    distance = np.linalg.norm(x.astype(np.float64), axis=1)
    distance[3] = np.inf
    np.testing.assert_array_equal(found["rows"][0], np.argsort(distance)[:5])
    np.testing.assert_allclose(found["distance"][0], np.sort(distance)[:5], rtol=1e-5)
    text = refused(capsys, "stats", tmp_path / "index", "--metric", "cosine")
    assert "was built for l2" in text


def test_parquet_and_folders_give_the_same_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa

    x = features()
    np.save(tmp_path / "x.npy", x)
    for name, kind in (("ragged", pa.list_(pa.float32())), ("fixed", pa.list_(pa.float64(), DIM))):
        halves = [pa.array(list(x[a:b]), type=kind) for a, b in ((0, 300), (300, ROWS))]
        for i, half in enumerate(halves):
            parquet(tmp_path / name / f"part-{i}.parquet", feature=half, path=[f"{r}.jpg" for r in range(len(half))])
        done(capsys, "build", tmp_path / name, "--out", tmp_path / f"{name}-index")
    done(capsys, "build", tmp_path / "x.npy", "--out", tmp_path / "npy-index")
    for file in (tmp_path / "npy-index").iterdir():
        assert (tmp_path / "ragged-index" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "fixed-index" / file.name).read_bytes() == file.read_bytes()


def test_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = features()
    x[:, 7] = 0.25
    x[10] = x[500] = x[600]
    np.save(tmp_path / "x.npy", x)
    found = json.loads(done(capsys, "stats", tmp_path / "x.npy", "--metric", "l2", "--json"))
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    eigen = np.linalg.eigvalsh(np.cov(x.astype(np.float64).T, bias=True)).clip(1e-300)
    p = eigen / eigen.sum()
    assert (found["rows"], found["dim"], found["duplicates"], found["constant_columns"]) == (ROWS, DIM, 2, 1)
    assert found["norm_mean"] == pytest.approx(norms.mean())
    assert found["norm_least"] == pytest.approx(norms.min())
    assert found["norm_of_mean"] == pytest.approx(np.linalg.norm(x.astype(np.float64).mean(0)))
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert "effective rank" in done(capsys, "stats", tmp_path / "x.npy")


def test_half_precision_and_damage(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "index"
    done(capsys, "build", table, "--out", index, "--storage", "float16", "--shards", 1)
    assert json.loads(done(capsys, "stats", index, "--json"))["storage"] == "float16"
    file = index / "rows-0-700.v0.npy"
    assert file.stat().st_size == 128 + ROWS * DIM * 2
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    for command in (["stats"], ["cluster", "-k", "3"], ["search", "--rows", "1"]):
        text = refused(capsys, command[0], index, *command[1:], status=1)
        assert "rows-0-700.v0.npy: rows 0 .. 700 are cut off or altered" in text


def test_nothing_is_overwritten_unasked_or_half(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, out = tmp_path / "index", tmp_path / "c.npz"
    done(capsys, "build", table, "--out", index)
    assert "holds an index: give another folder, or --overwrite" in refused(capsys, "build", table, "--out", index)
    before = {f.name: f.read_bytes() for f in index.iterdir()}
    broken = features()
    broken[650, 2] = np.inf
    np.save(tmp_path / "broken.npy", broken)
    text = refused(capsys, "build", tmp_path / "broken.npy", "--out", index, "--overwrite")
    assert "broken.npy: row 650 holds a number that is not finite" in text
    assert {f.name: f.read_bytes() for f in index.iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    done(capsys, "build", table, "--out", index, "--overwrite", "--shards", 1)
    assert len(list(index.iterdir())) == 2
    out.write_text("mine")
    assert f"--out {out} exists" in refused(capsys, "cluster", index, "-k", 2, "--out", out)
    assert out.read_text() == "mine"
    done(capsys, "cluster", index, "-k", 2, "--out", out, "--overwrite")
    assert np.load(out)["assignment_2"].shape == (ROWS,)


def test_what_is_wrong_is_named(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero = features()
    zero[17] = 0
    np.save(tmp_path / "zero.npy", zero)
    np.save(tmp_path / "whole.npy", np.arange(10))
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.save(tmp_path / "narrow.npy", features()[:, :5])
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty").mkdir()
    a, b = list(features(3)), list(features(3, 1))
    two = parquet(tmp_path / "two.parquet", a=a, b=b, label=[1, 2, 3])
    none = parquet(tmp_path / "none.parquet", label=[1, 2, 3])
    ragged = parquet(tmp_path / "ragged.parquet", f=[[1.0, 2.0], [3.0, 4.0], [5.0]])
    null = parquet(tmp_path / "null.parquet", f=[[1.0, 2.0], None, [5.0, 6.0]])
    (tmp_path / "bad.parquet").write_text("PAR1 not")
    for file, words in {
        "nothing.npy": "no such file",
        "zero.npy": "row 17 is zero, which has no direction; drop the row, or give --metric l2",
        "whole.npy": "int64 of shape (10,); give floats of shape (N, D)",
        "objects.npy": "no array that can be read",
        "text.npy": "no array that can be read",
        "empty": "neither an index (rows-*.json) nor a folder",
        two.name: "2 columns of lists of floats (a, b) among a, b, label; name one with --column",
        none.name: "0 columns of lists of floats (none) among label",
        ragged.name: "row 2 of 'f' has 1 numbers, not 2",
        null.name: "row 1 of 'f' has no numbers, not 2",
        "bad.parquet": "no Parquet file that can be read",
    }.items():
        text = refused(capsys, "stats", tmp_path / file)
        assert str(tmp_path / file) in text
        assert words in text
    assert json.loads(done(capsys, "stats", two, "--column", "b", "--json"))["rows"] == 3
    assert "no column 'c' of lists of floats; there are a, b" in refused(capsys, "stats", two, "--column", "c")
    assert "-k 701: the index has 700 rows" in refused(capsys, "cluster", table, "-k", 701)
    assert "the same number twice" in refused(capsys, "cluster", table, "-k", 3, 3)
    assert "-k 700: give 1 .. 699" in refused(capsys, "search", table, "--rows", 0, "-k", 700)
    assert "--rows 700: the index holds rows 0 .. 699" in refused(capsys, "search", table, "--rows", 700)
    text = refused(capsys, "search", table, "--queries", tmp_path / "narrow.npy")
    assert "rows of 5 numbers, the index: 12" in text
    text = refused(capsys, "cluster", table, "-k", 3, "--shards", 0, "--redo", 0, "--out", tmp_path / "no" / "c.txt")
    for words in ("--shards 0: give 1", "--redo 0: give 1", "a name that ends in .npz", "there is no folder"):
        assert words in text  # all at once
    np.savez(tmp_path / "other.npz", assignment_4=np.full(ROWS, 4))
    text = refused(capsys, "cluster", table, "-k", 3, 4, "--warm", tmp_path / "other.npz")
    assert "has no assignment_3; there are assignment_4" in text
    assert "assignment_4 does not give each of 700 rows a cluster below 4" in text
    folder = tmp_path / "mixed"
    folder.mkdir()
    np.save(folder / "a.npy", features())
    np.save(folder / "b.npy", features()[:, :5])
    assert "b.npy: rows of 5 numbers" in refused(capsys, "stats", folder)


def test_plan_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--rows", 1_281_167, "--dim", 128, "-k", 25_000, 50_000, 100_000, "--shards", 8, "--gflops", 70)
    text = done(capsys, "plan", *sizes, "--memory-gb", 0.1)
    assert "656.0 MB in all, 82.0 MB on each of 8 shards" in text
    assert "does not fit: " in text
    found = json.loads(done(capsys, "plan", *sizes, "--json"))
    assert found["passes"] == 303
    assert found["seconds"] > found["compute_seconds"] > 9000
    assert "5 clusters of 3 rows" in refused(capsys, "plan", "--rows", 3, "--dim", 2, "-k", 5, "--gflops", 1)


def test_help_is_light() -> None:
    code = (
        "import sys; from raycon.index.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'ray', 'faiss', 'pyarrow'} & set(sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "python -m raycon.index build FEATURES --out DIR" in answer.stdout


@pytest.mark.ray
def test_on_ray_the_same_files_and_numbers(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ray = pytest.importorskip("ray")
    from raycon.on_ray import here

    here.start(num_cpus=2, include_dashboard=False, namespace="raycon", log_to_driver=False)
    capsys.readouterr()
    try:
        for ray_or_not in ((), ("--ray",)):
            folder = tmp_path / f"with{len(ray_or_not)}"
            done(capsys, "build", table, "--out", folder, *ray_or_not)
            done(capsys, "cluster", folder, "-k", 7, "--out", f"{folder}.c.npz", *ray_or_not)
            done(capsys, "search", folder, "--rows", 1, 2, "--out", f"{folder}.s.npz", *ray_or_not)
        for file in (tmp_path / "with0").iterdir():
            assert (tmp_path / "with1" / file.name).read_bytes() == file.read_bytes()
        for kind in ("c", "s"):
            one, two = (np.load(tmp_path / f"with{i}.{kind}.npz") for i in (0, 1))
            assert all(np.array_equal(one[name], two[name]) for name in one.files)
        assert not [a for a in ray.util.list_named_actors(all_namespaces=True) if "index-program" in a["name"]]
    finally:
        ray.shutdown()
