"""Clusters against brute force and scikit-learn, what is counted and refused, and what a kill leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from sklearn.cluster import KMeans

from cliplet.errors import ArtifactError, ClipletError, DataError, EnvironmentError_, UsageError
from cliplet.train import cluster_files, embedding_rows, kmeans
from cliplet.train.cluster_quality import cluster_quality
from cliplet.train.clusters import Clusters, ClusterSettings, cluster, read_clusters, write_clusters

PROVENANCE = {"embeddings": "abc", "settings": {"clusters": 8, "sizes": (1, 2)}}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other in tiny searches take far longer than the searches, if other tests run."""
    monkeypatch.setattr("cliplet.train.kmeans.usable_cores", lambda: 1)


def unit(rows: np.ndarray, dtype: str = "float32") -> np.ndarray:
    exact = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return exact.astype(dtype)


def groups(images: int, count: int, width: int = 16, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around `count` directions, and which of these each belongs to."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((count, width))
    which = np.arange(images) % count
    return unit(directions[which] + noise * rng.standard_normal((images, width))), which


def clustered(
    features: np.ndarray, quiet: bool = True, done: np.ndarray | None = None, **more: Any
) -> Clusters:
    """Keywords of `ClusterSettings`, or of `cluster`."""
    own = {name: more.pop(name) for name in ("paths", "kept", "save_every_s") if name in more}
    all_done = np.ones(len(features), bool) if done is None else done
    return cluster(features, all_done, ClusterSettings(**more), quiet, **own)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_clear_groups_are_found_and_the_nearest_centres_are_those_of_brute_force(dtype: str) -> None:
    features, which = groups(400, 8)
    found = clustered(features.astype(dtype), clusters=24, positives=5)
    assert (found.centres_KD.shape, found.centres_KD.dtype) == ((24, 16), np.float32)
    assert (found.nearest_NL.shape, found.nearest_NL.dtype) == ((400, 5), np.int32)
    np.testing.assert_allclose(np.linalg.norm(found.centres_KD, axis=1), 1, atol=1e-6)
    cosines = features.astype(dtype).astype(np.float64) @ found.centres_KD.astype(np.float64).T
    wanted = -np.sort(-cosines, axis=1)[:, :5]
    np.testing.assert_allclose(found.similarity_NL, wanted, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosines, found.nearest_NL, axis=1), wanted, atol=1e-6)
    assert found.sizes_K.tolist() == np.bincount(found.nearest_NL[:, 0], minlength=24).tolist()
    quality = cluster_quality(found.nearest_NL, np.eye(8)[which], 24)
    assert quality["purity"] == 1, "no cluster holds two groups"
    assert found.stats["similarity"] == pytest.approx(wanted.mean(axis=0), abs=1e-6)
    assert found.stats["assignment"] == {"exact": True}
    json.dumps(found.stats)


@pytest.mark.parametrize("spherical", [True, False])
def test_an_iteration_is_that_of_lloyd(spherical: bool) -> None:
    rows, _ = groups(200, 8, noise=0.6)
    before = unit(np.random.default_rng(1).standard_normal((12, 16)))
    after, told = kmeans.KMeans(12, 0, spherical, 100).iterate(rows, before)
    distance = ((rows[:, None] - before[None]) ** 2).sum(axis=2)
    means = np.stack([rows[distance.argmin(axis=1) == k].mean(axis=0) for k in range(12)])
    np.testing.assert_allclose(after, unit(means) if spherical else means, atol=1e-6)
    cosine = (rows @ before.T).max(axis=1)
    assert told.objective == pytest.approx((cosine if spherical else distance.min(axis=1)).mean(), rel=1e-5)
    assert told.reseeded == 0 and 0 < told.search_seconds <= told.seconds


def test_scikit_learn_finds_nothing_to_improve() -> None:
    rows, _ = groups(600, 12, noise=0.6)
    settings_of = kmeans.KMeans(10, 0, spherical=False, exact_up_to=100)
    centres, told = kmeans.train_kmeans(settings_of, rows, 60, (None, []), lambda *_: None)
    other = KMeans(10, n_init=1, init=centres, tol=0).fit(rows)
    assert other.n_iter_ <= 2
    assert told[-1].objective * 600 == pytest.approx(other.inertia_, rel=1e-5)
    assert told[-1].objective < 0.9 * told[0].objective


@pytest.mark.parametrize("spherical", [True, False])
def test_iterations_only_get_better(spherical: bool) -> None:
    found = clustered(groups(600, 12, noise=0.6)[0], clusters=10, positives=1, spherical=spherical)
    objective = [i["objective"] * (1 if spherical else -1) for i in found.stats["iterations"]]
    np.testing.assert_allclose(np.linalg.norm(found.centres_KD, axis=1), 1, atol=1e-6)
    assert len(objective) == 20 and np.diff(objective).min() > -1e-6


def test_a_seed_decides() -> None:
    features, _ = groups(300, 30, noise=0.5)
    one, same, other = (clustered(features, clusters=12, seed=seed) for seed in (1, 1, 2))
    assert one.centres_KD.tobytes() == same.centres_KD.tobytes()
    assert one.nearest_NL.tobytes() == same.nearest_NL.tobytes()
    assert one.centres_KD.tobytes() != other.centres_KD.tobytes()


def test_images_without_an_embedding_have_no_cluster() -> None:
    features, _ = groups(100, 4)
    features[::10] = np.nan
    done = np.ones(100, bool)
    done[::10] = False
    found = clustered(features, done=done, clusters=4, positives=2)
    assert (found.nearest_NL[::10] == -1).all() and not found.similarity_NL[::10].any()
    assert (found.nearest_NL[done] >= 0).all()
    assert found.stats["images"] == found.sizes_K.sum() == 90


def test_a_sample_bounds_what_k_means_sees() -> None:
    features, _ = groups(1000, 4)
    found = clustered(features, clusters=4, positives=2, sample_per_cluster=20)
    assert (found.stats["sample"], found.stats["images"]) == (80, 1000)
    assert found.sizes_K.sum() == 1000


@pytest.mark.parametrize("spherical", [True, False])
def test_an_inverted_index_says_how_exact_it_is(spherical: bool) -> None:
    features, which = groups(3000, 100, noise=0.4)
    exact, through_index = (
        clustered(
            features,
            clusters=300,
            exact_up_to=limit,
            spherical=spherical,
            iterations=4,
        )
        for limit in (1000, 100)
    )
    told = through_index.stats["assignment"]
    assert not told["exact"] and told["recall"] >= 0.95 and told["rows"] >= 256
    assert (told["training_recall"] is None) != spherical
    cosines = features @ through_index.centres_KD.T
    true = np.argsort(-cosines, axis=1)[:, :8]
    hits = (through_index.nearest_NL[:, :, None] == true[:, None, :]).any(axis=2).mean()
    assert hits == pytest.approx(told["recall"], abs=0.05)
    truth = np.eye(100)[which]
    purity = [cluster_quality(run.nearest_NL, truth, 300)["purity"] for run in (exact, through_index)]
    assert purity[0] == pytest.approx(purity[1], abs=0.05)


def test_a_poor_index_is_made_to_look_at_more_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliplet.train.kmeans.TRAINING_PROBES", 1)
    rows = unit(np.random.default_rng(0).standard_normal((2000, 32)))
    found = clustered(rows, clusters=400, exact_up_to=0, iterations=2, positives=40)
    told = found.stats["assignment"]
    assert told["probes"] > 1 and told["recall"] >= 0.95 > told["training_recall"]
    # One cell holds fewer centres than are wanted, which is no excuse.
    similarity, nearest = kmeans.NearestCentres(found.centres_KD, 0).search(rows[:50], 40)
    wanted = -np.sort(-(rows[:50] @ found.centres_KD.T), axis=1)[:, :40]
    assert (nearest >= 0).all()
    np.testing.assert_allclose(similarity, wanted, atol=1e-5)


# What is counted and refused


def test_empty_clusters_are_given_half_of_another_and_counted() -> None:
    # Half of the images are the same: of the first centres, drawn among them, all but one lose every image.
    features, _ = groups(200, 40)
    features[:150] = features[0]
    found = clustered(features, clusters=30, iterations=10, positives=1)
    assert found.reseeded == sum(i["reseeded"] for i in found.stats["iterations"]) > 0
    assert found.stats["iterations"][0]["reseeded"] > 0
    assert (found.stats["duplicates"], found.stats["distinct"]) == (149, 51)
    assert found.stats["sizes"]["empty"] == (found.sizes_K == 0).sum()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_duplicates_are_counted_bit_by_bit(dtype: str) -> None:
    features, _ = groups(60, 6)
    features = features.astype(dtype)
    features[50:] = features[:10]
    features[3, 0] = np.nextafter(features[3, 0], np.array(1, dtype))
    found = clustered(features, clusters=6, positives=2)
    assert (found.stats["images"], found.stats["duplicates"]) == (60, 9)


def spoiled(rows: slice, value: float) -> np.ndarray:
    features, _ = groups(50, 5)
    features[rows] *= value
    return features


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (groups(5, 5)[0], r"5 images with an embedding, for 6 clusters[\s\S]*--clusters 5"),
        (
            np.repeat(groups(4, 4)[0], 20, axis=0),
            r"4 different embeddings among 80 images[\s\S]*--clusters 4",
        ),
        (np.zeros((0, 16), np.float32), r"0 images with an embedding"),
        (spoiled(slice(7, 8), np.nan), r"1 embedding not finite: p7"),
        (spoiled(slice(7, 12), np.inf), r"5 embeddings not finite: p7, p8, p9, …"),
        (spoiled(slice(7, 9), 0), r"2 embeddings of length 0: p7, p8"),
        (spoiled(slice(0, 50), 2), r"50 embeddings of another length than 1: p0, p1, p2, …"),
    ],
)
def test_embeddings_that_cannot_be_clustered_are_refused(features: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        clustered(features, clusters=6, positives=2, paths=[f"p{i}" for i in range(len(features))])


def test_a_sample_beyond_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = groups(50, 5)
    monkeypatch.setattr(embedding_rows, "memory_bytes", lambda: (10_000, 3_000, None))
    with pytest.raises(EnvironmentError_, match=r"50 embeddings take [\s\S]*sample_per_cluster to 128"):
        clustered(features, clusters=5, positives=2)
    monkeypatch.setattr(embedding_rows, "memory_bytes", lambda: None)
    assert clustered(features, clusters=5, positives=2).sizes_K.sum() == 50


@pytest.mark.parametrize(
    "wrong",
    [{"clusters": 0}, {"positives": 9}, {"positives": 0}, {"iterations": 0}, {"sample_per_cluster": 0}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        ClusterSettings(**{"clusters": 8, **wrong})


@pytest.mark.parametrize(("clusters", "warned"), [(26, True), (25, False), (50, True)])
def test_less_than_two_images_a_cluster_is_warned_of(
    clusters: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    found = clustered(groups(50, 5)[0], clusters=clusters)
    assert ("most will hold a single one" in caplog.text) == warned
    if clusters == 50:
        assert sorted(found.sizes_K) == [1] * 50 and found.stats["similarity"][0] == pytest.approx(1)


# Quality


def test_quality_by_hand() -> None:
    # Images 0 to 2 are in cluster 0 (cats, one of them a dog too), 3 and 4 in cluster 1 (a dog, a bird).
    truth = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]])
    nearest = np.array([[0, 1, 2], [0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 0, 2], [2, 0, 1], [-1, -1, -1]])
    found = cluster_quality(nearest, truth, 3)
    assert found["labelled_images"] == 5
    # Cluster 0 is cat, cluster 1 dog (the first of two that occur once), cluster 2 has no labelled image.
    assert found["purity"] == pytest.approx(4 / 5)
    assert found["agreement_by_rank"] == pytest.approx([4 / 5, 1 / 5, 0])
    assert found["conflict"] == pytest.approx(4 / 5)
    # Pairs: cats 0-1, 0-2, 1-2 together; dogs 1-3 apart; no birds.
    assert found["apart"] == pytest.approx(1 / 4)
    assert cluster_quality(nearest[:, :1], truth, 3)["conflict"] is None
    assert cluster_quality(nearest, 0 * truth, 3) == {"labelled_images": 0}
    unknown = np.where(truth == 0, -1, truth)
    assert cluster_quality(nearest, unknown, 3) == found, "what is not above 0 is not there"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40))
def test_quality_with_one_label_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    clusters, labels = (np.array(values) for values in zip(*pairs, strict=True))
    found = cluster_quality(clusters[:, None], np.eye(4)[labels], 5)
    assert found["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(labels, clusters), abs=1e-9)
    table = metrics.cluster.contingency_matrix(labels, clusters)
    assert found["purity"] == pytest.approx(table.max(axis=0).sum() / len(pairs))
    ((_, apart), (_, together)) = metrics.cluster.pair_confusion_matrix(clusters, labels)[[0, 1]]
    if apart + together:
        assert found["apart"] == pytest.approx(apart / (apart + together))
    else:
        assert found["apart"] is None


# Files


def same(one: Clusters, other: Clusters) -> bool:
    arrays = ("centres_KD", "nearest_NL", "similarity_NL", "sizes_K")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)


@pytest.fixture(scope="module")
def eight() -> Clusters:
    return clustered(groups(100, 8)[0], clusters=8, positives=3)


def test_what_was_written_is_read(tmp_path: Path, eight: Clusters) -> None:
    folder = tmp_path / "clusters"
    assert read_clusters(folder, PROVENANCE) is None
    write_clusters(folder, eight, PROVENANCE)
    for again in (read_clusters(folder, PROVENANCE), read_clusters(folder)):
        assert again is not None and same(again, eight)
        assert isinstance(again.centres_KD, np.memmap)
        assert again.reseeded == eight.reseeded and again.stats == eight.stats
    assert sorted(f.name for f in folder.iterdir()) == [
        *("centres.npy", "clusters.json", "nearest.npy", "similarity.npy", "sizes.npy")
    ]
    with pytest.raises(UsageError, match="other clusters, which differ in embeddings"):
        read_clusters(folder, {**PROVENANCE, "embeddings": "abd"})


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda f: (f / "nearest.npy").unlink(), DataError, "nearest.npy"),
        (
            lambda f: (f / "centres.npy").write_bytes((f / "centres.npy").read_bytes()[:200]),
            DataError,
            "cannot read",
        ),
        (lambda f: np.save(f / "sizes.npy", np.zeros(3, int)), DataError, "different lengths"),
        (lambda f: (f / "clusters.json").write_text("{"), DataError, "cannot read"),
        (lambda f: (f / "clusters.json").write_text('{"schema": 7}'), ArtifactError, "schema 7"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, eight: Clusters, harm: Callable[[Path], object], error: type[ClipletError], message: str
) -> None:
    write_clusters(tmp_path, eight, PROVENANCE)
    harm(tmp_path)
    with pytest.raises(error, match=message):
        read_clusters(tmp_path, PROVENANCE)


def test_a_full_disk_leaves_no_clusters_rather_than_half_of_them(
    tmp_path: Path, eight: Clusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clusters(tmp_path, eight, PROVENANCE)
    wanted = cluster_files.os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "similarity.npy":
            raise OSError(28, "No space left on device")
        wanted(source, target)

    monkeypatch.setattr(cluster_files.os, "replace", full)
    with pytest.raises(EnvironmentError_, match="no space left"):
        write_clusters(tmp_path, eight, PROVENANCE)
    assert read_clusters(tmp_path, PROVENANCE) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="cannot write"):
        write_clusters(tmp_path / "file" / "clusters", eight, PROVENANCE)


# Being killed

RUN = """
import sys
from pathlib import Path
import numpy as np
from cliplet.train import kmeans
from cliplet.train.clusters import ClusterSettings, cluster, write_clusters
iterate = kmeans.KMeans.iterate
def slow(self, *arguments):
    found = iterate(self, *arguments)
    global left
    left -= 1
    if not left:
        print("waits", flush=True)
        sys.stdin.read()
    return found
left = int(sys.argv[3])  # iterations until it waits to be killed; 0 never does
kmeans.KMeans.iterate = slow
kmeans.usable_cores = lambda: 1
features = np.load(sys.argv[1], mmap_mode="r")
out = Path(sys.argv[2])
settings = ClusterSettings(40, iterations=int(sys.argv[4]))
found = cluster(features, np.ones(len(features), bool), settings, True, kept=out, save_every_s=0)
write_clusters(out, found, {})
print(found.stats["resumed_after"])
"""


def test_a_killed_run_continues_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    features, _ = groups(2000, 60, noise=0.6)
    np.save(tmp_path / "features.npy", features)

    def command(out: str, waits_after: str, iterations: str = "12") -> list[str]:
        place = str(tmp_path / out)
        return [sys.executable, "-c", RUN, str(tmp_path / "features.npy"), place, waits_after, iterations]

    def killed_in_the_fifth_iteration() -> None:
        arguments = command("killed", "5")
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            process.kill()

    whole = subprocess.run(command("whole", "0"), capture_output=True, text=True, check=True)
    assert whole.stdout.splitlines()[-1] == "0"
    killed_in_the_fifth_iteration()
    assert read_clusters(tmp_path / "killed", {}) is None
    other = subprocess.run(command("killed", "0", "13"), capture_output=True, text=True, check=True)
    assert other.stdout.splitlines()[-1] == "0", "another run does not continue this one"
    killed_in_the_fifth_iteration()
    last = subprocess.run(command("killed", "0"), capture_output=True, text=True, check=True)
    assert last.stdout.splitlines()[-1] == "4"
    one, two = (read_clusters(tmp_path / out) for out in ("whole", "killed"))
    assert one is not None and two is not None and same(one, two)
    assert [i["objective"] for i in one.stats["iterations"]] == [
        i["objective"] for i in two.stats["iterations"]
    ]
    assert sorted(f.name for f in (tmp_path / "killed").iterdir()) == sorted(
        f.name for f in (tmp_path / "whole").iterdir()
    )


def test_what_was_kept_and_is_damaged_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    features, _ = groups(200, 8)
    wanted = clustered(features, clusters=8, kept=tmp_path, save_every_s=0)
    assert (tmp_path / "kmeans.json").exists()
    (arrays,) = tmp_path.glob("kmeans-*.safetensors")
    arrays.write_bytes(b"damaged")
    again = clustered(features, clusters=8, kept=tmp_path, save_every_s=0)
    assert same(wanted, again) and again.stats["resumed_after"] == 0
    assert "starts anew" in caplog.text
    # What the last iteration but one left lets the same run end at once.
    assert clustered(features, clusters=8, kept=tmp_path).stats["resumed_after"] == 19
