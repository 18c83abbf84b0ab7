"""The picture panels: their numbers against independent computations, their pictures against the data set."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raycon import methods, report
from raycon.core.config import override, save_yaml
from raycon.core.types import Snapshot
from raycon.data_loaders.datasets import open_dataset
from raycon.nn import optim, views
from raycon.recipes import recipe
from raycon.report import board, panel_file, panels, sample
from raycon.report.__main__ import main, save_pictures
from raycon.training import checkpoint, job

CLUSTERS = 7


def make_run(
    run_dir: Path, recipe_name: str = "quickstart", snapshot: bool = True, step: int = 3, **options: Any
) -> Path:
    """A run directory with one checkpoint of an untrained network, and a snapshot of known assignments."""
    config = override(recipe(recipe_name), {"model.width": 4, "data.cache": str(run_dir / "cache"), **options})
    config = replace(config, run=replace(config.run, dir=str(run_dir)))
    run_dir.mkdir(exist_ok=True)
    save_yaml(config, run_dir / "config.yaml")
    train = job.open_data(config)
    method = job.build_method(config, job.facts_of(config, train, 1), 1)
    assignment = torch.arange(len(train)) * 13 % CLUSTERS
    assignment[assignment == 5] = 4  # an empty cluster
    dim = int(getattr(config.method, "dim", 0))
    unit = torch.nn.functional.normalize(torch.randn(CLUSTERS, dim), dim=1)
    phi = torch.tensor([0.3, 0.2, 0.25, 0.05, 0.4, 0.9, 0.1])
    mined = (
        Snapshot(0, (assignment,), (unit,), (phi,), torch.arange(len(train))[:, None].roll(-1, 0)) if snapshot else None
    )
    state = {"step": step, "epoch": 0, "steps": 100, "method": config.method.name, "evaluate": False}
    checkpoint.save(run_dir / "checkpoints", method, optim.build_optimizer(method, config.train), mined, state)
    return run_dir


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, panel_file.Panels]:
    run_dir = make_run(tmp_path_factory.mktemp("panels") / "run")
    return run_dir, sample.gather(run_dir, rows=150)


def test_pictures_are_those_of_the_rows(gathered: tuple[Path, panel_file.Panels]) -> None:
    arrays = gathered[1].arrays
    sets = [open_dataset("digits", split=split) for split in ("train", "test")]
    for t in range(0, len(arrays["tiles"]), 17):
        dataset, row = sets[arrays["tile_split"][t]], int(arrays["tile_row"][t])
        assert np.array_equal(arrays["tiles"][t], dataset.read(row))
        assert arrays["tile_label"][t] == dataset.label[row]
    assert len(arrays["map_tile"]) == 90
    assert (arrays["map_by_fine class"] == sets[0].label[arrays["tile_row"][arrays["map_tile"]]]).all()


def test_clusters_are_counted_over_all_rows(gathered: tuple[Path, panel_file.Panels]) -> None:
    arrays, (told,) = gathered[1].arrays, gathered[1].about["clusterings"]
    label = open_dataset("digits").label
    assignment = np.arange(len(label)) * 13 % CLUSTERS
    assignment[assignment == 5] = 4
    assert (told["k"], told["used"], told["single"], told["by"]) == (7, 6, 0, "concentration phi")
    groups = dict(
        zip(
            told["groups"], np.split(arrays["cluster_0_id"], np.cumsum(list(told["groups"].values()))[:-1]), strict=True
        )
    )
    assert groups["largest"][0] == 4
    assert groups["tightest"].tolist() == [3, 6, 1, 2, 0, 4]  # the empty cluster 5 is nowhere
    for cluster, numbers, tiles in zip(arrays["cluster_0_id"], told["clusters"], arrays["cluster_0_tile"], strict=True):
        rows = np.flatnonzero(assignment == cluster)
        counts = np.bincount(label[rows])
        assert numbers["size"] == len(rows)
        assert numbers["purity"] == pytest.approx(counts.max() / len(rows))
        assert counts[numbers["label"]] == counts.max()
        assert (assignment[arrays["tile_row"][tiles[tiles >= 0]]] == cluster).all()
    whole = sum(np.bincount(label[assignment == c]).max() for c in range(7) if c != 5) / len(label)
    assert told["purity"] == pytest.approx(whole)
    members, anchors = arrays["tile_row"][arrays["member_tile"]], arrays["tile_row"][arrays["member_anchor"]]
    assert (assignment[members] == assignment[anchors][:, None]).all()
    assert (members != anchors[:, None]).all()
    neighbours = arrays["tile_row"][arrays["neighbour_tile"]]
    assert (neighbours[:, 0] == (arrays["tile_row"][arrays["neighbour_anchor"]] + 1) % len(label)).all()


def test_retrieval_is_that_of_the_encoder(gathered: tuple[Path, panel_file.Panels]) -> None:
    run_dir, found = gathered
    config = methods.read_config(run_dir / "config.yaml")
    test = open_dataset("digits", split="test")
    method = job.build_method(config, job.facts_of(config, test, 1), 1)
    method.load_state_dict(checkpoint.load(run_dir / "checkpoints" / "last").model)
    view = views.eval_view(torch.from_numpy(test.images).permute(0, 3, 1, 2), views.eval_spec(16, test.mean, test.std))
    features = method.eval().encoder()(view).detach()
    gallery = sample._chosen(len(test), 60, config.seed)
    unit = torch.nn.functional.normalize(features)
    for q in range(len(found.arrays["retrieval_query"])):
        query = int(found.arrays["tile_row"][found.arrays["retrieval_query"][q]])
        cosine = (unit[gallery] @ unit[query]).masked_fill(torch.from_numpy(gallery == query), -9)
        best = cosine.topk(10)
        assert found.arrays["retrieval_cosine"][q] == pytest.approx(best.values.numpy(), abs=1e-5)
        rows = found.arrays["tile_row"][found.arrays["retrieval_tile"][q]]
        assert cosine[np.searchsorted(gallery, rows)].numpy() == pytest.approx(best.values.numpy(), abs=1e-5)
    assert found.arrays["confusion"].sum() == 60


def test_positives_are_the_methods_own(tmp_path: Path) -> None:
    run_dir = make_run(
        tmp_path / "run",
        "fashion-mnist-sce-cpu",
        snapshot=False,
        **{"data.name": "digits", "data.size": 16, "data.views": "digits", "method.queue": 256, "train.batch": 64},
    )
    found = sample.gather(run_dir, rows=60)
    told = found.about["positives"]
    assert told["candidates"] == 256
    weight, own = found.arrays["positive_weight"], found.arrays["positive_own"]
    assert (np.diff(weight, axis=1) <= 0).all()
    assert (weight.sum(1) + own <= 1 + 1e-5).all()
    assert (own >= 0.5).all()  # SCE's lambda, and the own key's logit of 0
    assert "member_anchor" not in found.arrays


def test_positives_are_as_many_as_a_batch_or_a_queue(gathered: tuple[Path, panel_file.Panels]) -> None:
    assert "positive_anchor" not in gathered[1].arrays  # PCL's positives are prototypes


def test_pca_is_that_of_the_singular_vectors() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3.0, 1, 1, 1, 0.1])
    scores, share = sample.pca(x, 2)
    u, s, _ = np.linalg.svd((x - x.mean(0)).double().numpy(), full_matrices=False)
    assert np.abs(scores.numpy()) == pytest.approx(np.abs(u[:, :2] * s[:2]), abs=1e-4)
    assert share == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
    assert sample.pca(x[:, :1], 2)[0].shape == (40, 2)
    assert sample.pca(torch.zeros(5, 3), 2)[1] == 1.0


def test_purity_without_labels_and_with_some() -> None:
    share, label = sample.purity(np.array([0, 0, 1, 1, 1, 3]), np.array([2, 2, 1, -1, 0, -1]), 4)
    assert share[:2] == pytest.approx([1.0, 0.5])
    assert np.isnan(share[2:]).all()
    assert label.tolist() == [2, 0, -1, -1]
    assert np.isnan(sample.purity(np.array([0]), np.array([-1]), 1)[0]).all()


def test_kept_and_read_back(gathered: tuple[Path, panel_file.Panels], tmp_path: Path) -> None:
    file = panel_file.save(gathered[1], tmp_path / panel_file.FILE)
    assert [p.name for p in tmp_path.iterdir()] == [panel_file.FILE]
    again = panel_file.load(file)
    assert again.about == gathered[1].about
    assert all(np.array_equal(again.arrays[k], v) for k, v in gathered[1].arrays.items())
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="delete it"):
        panel_file.load(file)
    with file.open("wb") as handle:  # a pickle is never opened
        np.savez(handle, about=np.array({"format": 1}, dtype=object))
    with pytest.raises(ValueError, match="delete it"):
        panel_file.load(file)


def test_page_holds_the_pictures_and_makes_them_once(
    gathered: tuple[Path, panel_file.Panels], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, found = gathered
    calls = []

    def gather(folder: Path, rows: int) -> panel_file.Panels:
        calls.append(folder)
        return found

    monkeypatch.setattr(sample, "gather", gather)
    assert 'id="map"' not in report.write(run_dir).read_text(encoding="utf-8")
    text = report.write(run_dir, gather=True).read_text(encoding="utf-8")
    report.write(run_dir, gather=True)
    assert len(calls) == 1  # the second time they were there
    for section in ("map", "montage", "positives", "retrieval", "confusion"):
        assert f'<section id="{section}"' in text
    match = re.search(r"background-image:url\(data:image/png;base64,([^)]*)\)", text)
    assert match is not None
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(match[1]))))
    tile = len(found.arrays["tiles"]) - 1
    top, left = tile // panels.ACROSS * 8, tile % panels.ACROSS * 8
    assert np.array_equal(sheet[top : top + 8, left : left + 8], found.arrays["tiles"][tile][..., 0])
    assert f'style="--x:{tile % panels.ACROSS};--y:{tile // panels.ACROSS}"' in text
    shutil.copytree(run_dir / "checkpoints" / "00000003", run_dir / "checkpoints" / "00000009")
    report.write(run_dir, gather=True)  # a newer checkpoint
    assert len(calls) == 2


def test_pictures_that_cannot_be_made_are_a_note(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", snapshot=False)
    for file in run_dir.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"torn")
    text = report.write(run_dir, gather=True).read_text(encoding="utf-8")
    assert "could not be made" in text
    assert "has no readable checkpoint" in text


def test_a_large_sheet_is_stored_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 32, 32, 3), dtype=np.uint8)
    sheet = panels.Sheet(panel_file.Panels({"classes": [], "weak_classes": []}, {"tiles": noise}))
    assert "image/png" in sheet.style()
    monkeypatch.setattr(panels, "SHEET_BYTES", 200_000)
    assert "image/jpeg" in sheet.style()
    assert len(sheet.style()) < 300_000


@pytest.mark.slow
def test_in_a_browser(gathered: tuple[Path, panel_file.Panels], tmp_path: Path) -> None:
    """A real browser runs the page's script without an error and draws the legend of the map."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    run_dir, found = gathered
    panel_file.save(found, run_dir / panel_file.FILE)
    page = report.write(run_dir)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=2000",
    ]
    done = subprocess.run(
        [browser, *options, "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    legend = re.search(r'<ul class="legend pick">(.*?)</ul>', done.stdout)
    assert legend is not None
    assert legend[1].count("<li") == 10


def test_the_board_shows_what_the_page_shows(gathered: tuple[Path, panel_file.Panels]) -> None:
    found = gathered[1]
    arrays, drawn = found.arrays, board.draw(found)
    pictures = {name: np.asarray(Image.open(io.BytesIO(png))) for name, png in drawn.pictures.items()}
    assert set(pictures) == {
        *(f"report/map/t-SNE by {by}" for by in ("fine class", "clustering 0")),
        "report/map/PCA by fine class",
        "report/clusters/0",
        "report/positives/members",
        "report/positives/neighbours",
        "report/nearest images",
        "report/confusion",
    }
    assert drawn.step == 3
    # A point of the map lies where its coordinates say, in the colour of its class.
    at, label = arrays["map_t-SNE"], arrays["map_by_fine class"]
    alone = int(np.argmax([np.sort(np.square(at - p).sum(1))[1] for p in at]))  # nothing drawn over it
    x, y = (round(float(v)) for v in (8 + at[alone, 0] * 844, 40 + 8 + (1 - at[alone, 1]) * 844))
    wanted = board._colour(int(label[alone]), True)
    assert "#" + bytes(pictures["report/map/t-SNE by fine class"][y, x]).hex() == wanted

    table = drawn.tables["report/map"]
    assert table.columns == ["row", "t-SNE x", "t-SNE y", "PCA x", "PCA y", "fine class", "clustering 0"]
    digits = open_dataset("digits")
    by = table.columns.index("fine class")
    assert all(line[by] == digits.classes[digits.label[line[0]]] for line in table.rows)
    clusters = drawn.tables["report/clusters/0"]
    assert [(line[1], line[2]) for line in clusters.rows] == [
        (int(c), told["size"])
        for c, told in zip(arrays["cluster_0_id"], found.about["clusterings"][0]["clusters"], strict=True)
    ]
    assert [line[1:] for line in drawn.tables["report/confusion"].rows] == arrays["confusion"].tolist()
    hits = arrays["tile_label"][arrays["retrieval_tile"]] == arrays["tile_label"][arrays["retrieval_query"]][:, None]
    assert [line[1] for line in drawn.tables["report/nearest images"].rows] == hits.sum(1).tolist()


def test_strips_have_frames_and_bars(gathered: tuple[Path, panel_file.Panels]) -> None:
    found = gathered[1]
    pen = board._Pen(found)
    label = found.arrays["tile_label"]
    same = int(np.flatnonzero(label == label[0])[1])
    other = int(np.flatnonzero(label != label[0])[0])
    strip = np.asarray(pen.strip([same, -1, other], 0, [0.5, 0.3, 0.25], frames=True))
    side = pen.side
    assert side == 48  # 8 pixels, six times
    colours = ["#" + bytes(strip[10, x]).hex() for x in (1, side + 6 * 4 + 1, side + 6 * 4 + side + 4 + 1)]
    assert colours == [board._ACCENT, board._RIGHT, board._WRONG]
    assert np.array_equal(strip[3:45:6, 3 : side - 3][:, ::6, 0], found.arrays["tiles"][0][..., 0][:7, :7])
    bars = [(strip[side + 5, x : x + side] == [0x25, 0x63, 0xC9]).all(1).sum() for x in (72, 124)]
    assert bars == [48, 25]  # 0.5 is the largest; 0.25 half of it


def test_a_board_of_nothing(tmp_path: Path) -> None:
    assert board.read(tmp_path) == board.Board(0, {}, {})


def test_pictures_as_files(gathered: tuple[Path, panel_file.Panels], tmp_path: Path) -> None:
    panel_file.save(gathered[1], tmp_path / panel_file.FILE)
    save_pictures(tmp_path, tmp_path / "png")
    names = {f.name for f in (tmp_path / "png").iterdir()}
    assert {"map-t-SNE-by-fine-class.png", "clusters-0.png", "nearest-images.png", "confusion.png"} <= names
    with pytest.raises(ValueError, match="has no pictures"):
        save_pictures(tmp_path / "png", tmp_path / "more")


def test_a_comparison_shows_the_maps_side_by_side(
    gathered: tuple[Path, panel_file.Panels], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
    panel_file.save(gathered[1], tmp_path / "one" / panel_file.FILE)
    folders = [tmp_path / name for name in ("one", "two", "three")]
    assert 'id="maps"' not in report.compare(folders, tmp_path / "c.html").read_text(encoding="utf-8")
    panel_file.save(gathered[1], tmp_path / "three" / panel_file.FILE)
    text = report.compare(folders, tmp_path / "c.html").read_text(encoding="utf-8")
    assert re.findall('alt="(Map of [^"]*)"', text) == ["Map of one, step 3", "Map of three, step 3"]
    assert main([str(folders[0]), str(folders[1]), "--pictures", str(tmp_path)]) == 2
    assert "--pictures is for one run" in capsys.readouterr().err
    assert main([str(folders[0]), "--rows", "30000"]) == 2
    assert "at most 20,000" in capsys.readouterr().err
